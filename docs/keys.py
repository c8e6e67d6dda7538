"""A Sphinx directive, `keys`: every key of a configuration, from the models that check it."""

import json
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from dist_adv.config.__main__ import json_schema
from dist_adv.text import pixels

Schema = dict[str, Any]


def values(schema: Schema) -> str:
    """Return in words what a key takes: `sgd` or `adamw`; a number; a list."""
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema:
        return "keys of its own"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(values(each) for each in schema["anyOf"]))
    match schema.get("type"):
        case "string" if "pattern" in schema and "0-9" in schema["pattern"]:
            return "a number"
        case "string" if schema.get("pattern") == ":":
            return "`module:Name`"
        case "object" if "patternProperties" in schema:
            return "values by epoch"
    names = {"null": "`null`", "integer": "an integer", "array": "a list", "object": "a mapping"}
    names |= {"boolean": "`true`, `false`", "string": "text", "number": "a number"}
    return names.get(schema.get("type", ""), "anything")


def default(key: str, schema: Schema) -> str:
    value = schema.get("default")
    if isinstance(value, float):
        return pixels(value) if key in ("alpha", "eps") else f"{value:.6g}"
    return json.dumps(value).strip('"')


def explained(description: str, keys: list[str]) -> tuple[str, dict[str, str]]:
    """Split a section's description into what it says of itself and of its keys (`key: ...`)."""
    names = "|".join(map(re.escape, keys))
    pieces = re.split(rf"(?:^|(?<=[.;\n]))\s*((?:(?:{names}), )*(?:{names})): ", description)
    of_keys = {
        key: text.strip()
        for said, text in zip(pieces[1::2], pieces[2::2], strict=True)
        for key in said.split(", ")
    }
    return pieces[0].strip(), of_keys


def table(section: Schema) -> list[str]:
    """Return a section's description and the rows of its keys, as Markdown."""
    properties: Schema = section.get("properties", {})
    lead, of_keys = explained(section.get("description", ""), list(properties))
    rows = []
    for key, each in properties.items():
        if key != "name" or "const" not in each:
            text = " ".join((each.get("description") or of_keys.get(key, "")).split())
            usual = f"; default `{default(key, each)}`" if "default" in each else ""
            rows.append(f"| `{key}` | {values(each)}{usual} | {text} |")
    head = ["| key | values | |", "|---|---|---|"] if rows else []
    return [lead, "", *head, *rows, ""]


def in_common(alternatives: list[Schema]) -> Schema:
    """Return a key's schema of all kinds: of what differs, defaults go and a description stays."""
    found = max(alternatives, key=lambda each: len(each.get("description", "")))
    if any(each.get("default") != found.get("default") for each in alternatives):
        return {key: value for key, value in found.items() if key != "default"}
    return found


def page(schema: Schema) -> str:
    """Return all sections as Markdown; kinds of a section are told apart by `name`."""
    definitions, lines = schema["$defs"], []
    for name, section in schema["properties"].items():
        if name == "extends":
            continue
        lines += [f"## `{name}`", ""]
        kinds = [
            definitions[each["$ref"].split("/")[-1]] if "$ref" in each else each
            for each in section.get("anyOf", [section])
        ]
        kinds = [kind for kind in kinds if "properties" in kind]
        named = [kind for kind in kinds if "const" in kind["properties"].get("name", {})]
        if not named:
            lines += table(kinds[0])
            for key, each in kinds[0]["properties"].items():
                if "$ref" in each:
                    inner = definitions[each["$ref"].split("/")[-1]]
                    lines += [f"### `{name}.{key}`", "", *table(inner)]
            continue
        common = set.intersection(*(set(kind["properties"]) for kind in named)) - {"name"}
        alternatives = {
            key: [kind["properties"][key] for kind in named]
            for key in named[0]["properties"]
            if key in common
        }
        shared = {key: in_common(each) for key, each in alternatives.items()}
        lines += ["Of every kind:", "", *table({"properties": shared})]
        for kind in named:
            own = {k: v for k, v in kind["properties"].items() if k not in common}
            title = kind["properties"]["name"]["const"]
            lines += [f"### `{name}: {{name: {title}}}`", "", *table(kind | {"properties": own})]
    return "\n".join(lines)


class Keys(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(page(json_schema()), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("keys", Keys)
    return {"parallel_read_safe": True}
