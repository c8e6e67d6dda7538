"""Building blocks of the configuration: strict models, and numbers that may be fractions."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.functional_validators import AfterValidator


class Options(BaseModel):
    """A section of the configuration. Unknown keys are errors; nothing is coerced silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
Guard = Literal["none", "warn", "stop"]
"""Against catastrophic overfitting: do nothing, say so, or stop with the last good weights."""


class MethodOptions(Options):
    """What every training method has."""

    guard: Guard = "none"
    guard_rule: Literal["gap", "wong"] = "gap"
    """When an epoch has collapsed: PGD-5 accuracy on fixed training images parted from FGSM
    accuracy; or fell by more than 0.2 from batch to batch, as Wong et al. 2020 have it."""
