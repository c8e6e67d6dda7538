"""`python -m dist_adv.config` prints the JSON Schema of a configuration file."""

import json
from typing import Any

from dist_adv.by_epoch import KEYS
from dist_adv.config.schema import Config


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema for editors: a file may leave out what it extends or has a default."""
    schema = Config.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        section.pop("required", None)
        for field in section.get("properties", {}).values():
            field.pop("discriminator", None)
            if "oneOf" in field:  # a file that leaves `name` to its base may fit several kinds
                field["anyOf"] = field.pop("oneOf")
    for key in KEYS:
        _allow_epochs(schema, *key.split("."))
    schema["properties"]["extends"] = {"type": "string", "description": "A file to start from."}
    return schema


def _allow_epochs(schema: dict[str, Any], section: str, name: str) -> None:
    """Allow a mapping of epochs, as `by_epoch` has it, in the place of a value."""
    whole = schema["properties"][section]
    for kind in whole.get("anyOf", [whole]):
        kind = schema["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind
        if name not in kind["properties"]:
            continue
        one = kind["properties"][name]
        about = {each: one.pop(each) for each in ("title", "default", "description") if each in one}
        epochs = {"^[0-9]+$": one}
        mapping = {"type": "object", "patternProperties": epochs, "additionalProperties": False}
        kind["properties"][name] = about | {"anyOf": [one, mapping]}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
