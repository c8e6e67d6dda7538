"""`python -m dist_adv.config` prints the JSON Schema of a configuration file."""

import json
from typing import Any

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
    schema["properties"]["extends"] = {"type": "string", "description": "A file to start from."}
    return schema


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
