"""What is wrong with a configuration, in a line: the key, the problem, the remedy."""

import re
from collections.abc import Mapping
from datetime import date
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dist_adv.config.compare import flatten
from dist_adv.config.schema import Config, Judged
from dist_adv.config.yaml_text import parse_yaml
from dist_adv.text import nearest


def explain(
    error: ErrorDetails, tree: Mapping[str, Any], kind: type[Config | Judged] = Config
) -> str:
    """One problem as 'key: what is wrong; what to do'."""
    # A section that is one of several kinds has its kind in the location: drop it.
    names = {str(section.get("name")) for section in tree.values() if isinstance(section, dict)}
    place = [str(part) for part in error["loc"]]
    key = ".".join([*place[:1], *(p for i, p in enumerate(place[1:]) if i > 0 or p not in names)])
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_elsewhere(place, tree, kind)}"
        case "missing" if isinstance(error["loc"][-1], int):
            return f"{key}: missing; the list is too short"
        case "missing" if len(place) > 1:
            return f"{key}: missing; set it"
        case "missing":
            return f"{key}: missing; a {key} is needed: {kind.NEEDS!r}"
        case "name":
            return f"{key}.name: {error['msg']}"
        case "literal_error":
            found = error["input"]
            kinds = re.findall("'(.*?)'", context["expected"])
            return f"{key}: {found!r} is not known{nearest(str(found), kinds)}"
        case "model_type" | "model_attributes_type":
            return f"{key}: is a section with keys of its own, not {error['input']!r}"
        case "value_error":
            reason = str(context["error"])
            if not key:  # of the whole configuration: it names one
                return reason
            return f"{key}.{reason}" if _names_a_key(reason) else f"{key}: {reason}"
        case _:
            return f"{key}: {error['msg'].lower()} (it is {error['input']!r}){_remedy(error, key)}"


def _remedy(error: ErrorDetails, key: str) -> str:
    """Return what to write for a value of another type than the key's."""
    value = error["input"]
    match error["type"]:
        case "string_type" if isinstance(value, bool | int | float | date):
            # In a list the last part of the key is the number of the element.
            return f"; put it in quotes, in a shell in two kinds: {key}='\"{value}\"'"
        case "list_type" if isinstance(value, str):
            return f"; write it in brackets: {key}=[{value}]"
        case "int_type" if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return f"; write it without quotes: {key}={value}"
        case "bool_type":
            return "; write true or false"
        case _:
            return ""


def _elsewhere(place: list[str], tree: Mapping[str, Any], kind: type[Config | Judged]) -> str:
    """Where a key that is not known at `place` is one: in another section, or nearly so here."""
    chosen = {
        name: {"name": section["name"]}
        for name, section in tree.items()
        if isinstance(section, Mapping) and "name" in section
    }
    least = parse_yaml(kind.NEEDS, kind.__name__)
    try:
        known = kind.model_validate({**least, **chosen})
    except ValidationError:
        known = kind.model_validate(least)
    keys = flatten(known.model_dump())
    homes = [key for key in keys if key.split(".")[-1] == place[-1]]
    if homes:
        return f"; did you mean {' or '.join(map(repr, homes))}?"
    section: Any = known
    for part in place[:-1]:
        inner = getattr(section, part, section)  # one of several kinds has its kind there
        if inner is None:  # a section that is there only where it is asked for
            inner = get_args(type(section).model_fields[part].annotation)[0].model_construct()
        section = inner
    return nearest(place[-1], list(type(section).model_fields))


def _names_a_key(reason: str) -> bool:
    """Tell whether a message names its key, as those of checks of a whole section do."""
    return reason.split(":")[0].isidentifier() and ":" in reason
