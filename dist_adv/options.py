"""Building blocks of the configuration: strict models, and numbers that may be fractions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic.functional_validators import AfterValidator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Options(BaseModel):
    """A section of the configuration. Unknown keys are errors; nothing is coerced silently.

    A string below a key describes it, in the schema that editors read and on the site.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


def parse_number(value: object) -> object:
    """Turn `8/255`, `5e-4` (a string to YAML 1.1) or `0.1` into a float; leave the rest alone."""
    if not isinstance(value, str):
        return value
    numerator, slash, denominator = value.partition("/")
    try:
        number = float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"{value!r} is not a number; write 0.03 or a fraction like 8/255"
        ) from None
    return number


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Real = Annotated[
    float,
    BeforeValidator(parse_number),
    AfterValidator(_finite),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number"},
                {"type": "string", "pattern": r"^\s*[-+0-9.eE]+\s*(/\s*[0-9.eE]+\s*)?$"},
            ]
        }
    ),
]


def _pixel_units(value: float) -> float:
    if value <= 0:
        raise ValueError("must be above 0, in pixel units of [0, 1]; for example 2/255")
    if value >= 1:
        raise ValueError(
            f"is in pixel units of [0, 1], and {value:g} is too large; did you mean {value:g}/255?"
        )
    return value


StepSize = Annotated[Real, AfterValidator(_pixel_units)]
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[Real, Field(ge=0, le=1)]
TUPLE = Field(strict=False)
"""Annotates a tuple: YAML has lists."""


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Return a JSON Schema with its definitions in the places where it refers to them."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(each, definitions) for key, each in schema.items()}


@dataclass(frozen=True)
class Open:
    """Annotates a section of which the `name` says the kind: dist_adv's own, or somebody else's.

    own: the options of dist_adv's kinds, by name; find: those of any name, or ValueError. usual:
    the kind of a section that names none.
    """

    own: Callable[[], Mapping[str, type[Options]]]
    find: Callable[[str], type[Options]]
    usual: str | None = None

    def _choose(self, value: Any) -> Any:
        """Check a section by the options of its kind; what is none is left to who asks for one."""
        if not isinstance(value, Mapping):
            return value
        name = value.get("name", self.usual)
        if name is None:
            names = ", ".join(self.own())
            raise PydanticCustomError("name", "missing; choose from {names}", {"names": names})
        if not isinstance(name, str):
            context = {"name": repr(name), "names": ", ".join(self.own())}
            raise PydanticCustomError("name", "{name} is no name; choose from {names}", context)
        try:
            options = self.find(name)
        except ValueError as error:
            raise PydanticCustomError("name", "{why}", {"why": str(error)}) from error
        return options.model_validate(dict(value))

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._choose, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        kinds = []
        for name, each in self.own().items():
            kind = each.model_json_schema()
            kind = _inlined(kind, kind.pop("$defs", {}))
            kind["properties"]["name"] = {"const": name}
            kinds.append(kind)
        reference = {"name": {"type": "string", "pattern": ":"}}
        return {"anyOf": [*kinds, {"type": "object", "properties": reference}]}
