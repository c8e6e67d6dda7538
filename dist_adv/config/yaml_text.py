"""YAML as people read it, and errors that show the line."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from dist_adv.errors import UserError

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, and a number is what people take it for.

    To YAML 1.1, and so to PyYAML, 010 is 8, 1:30 is 90 and 1e-6 is text. Here leading zeros mean
    nothing and 1e-6 is a number, as in YAML 1.2, and 1:30 is text. JSON is read as it is meant:
    its two escapes of one character are one.
    """

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if tag not in (_INT, _FLOAT)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, because merge keys (<<) are resolved into repeated ones afterwards.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = node.value.replace("_", "").lower()
        base = {"0x": 16, "0b": 2}.get(digits.lstrip("+-")[:2], 10)
        return int(digits, base)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


class Dumper(yaml.SafeDumper):
    """YAML that both `Loader` and YAML 1.1 read back to the same: the text 08 is in quotes."""


Loader.add_constructor(_INT, Loader.construct_yaml_int)
Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_yaml_str)
for _class in (Loader, Dumper):
    _class.add_implicit_resolver(
        _INT, re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$"), list("-+0123456789")
    )
    _class.add_implicit_resolver(
        _FLOAT,
        re.compile(
            r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"
            r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
            r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    )


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return a mapping as YAML, which `read_mapping` reads back to the same."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, default_flow_style=None)


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML lets Python's own errors through: a date of month 13, brackets without end.
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{source}:{place} not valid YAML ({problem}): {_shown(text)}") from None


def _shown(text: str) -> str:
    line = text.strip().split("\n")[0]
    return repr(line if len(line) <= 40 else line[:40] + "...")
