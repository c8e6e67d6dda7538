"""Training methods, one file each. A new one is a file and a line in each table below."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from dist_adv.attacks.threat import Threat
from dist_adv.methods.base import Method, Net, Step
from dist_adv.methods.fast import Fast, FastOptions
from dist_adv.methods.free import Free, FreeOptions
from dist_adv.methods.natural import Natural, NaturalOptions
from dist_adv.methods.pgd import PGDOptions, PGDTraining

__all__ = ["Method", "MethodChoice", "Net", "Step", "build_method"]

MethodChoice = Annotated[
    NaturalOptions | PGDOptions | FreeOptions | FastOptions, Field(discriminator="name")
]

_METHODS: dict[str, Callable[[Any, Threat], Method]] = {
    "natural": Natural,
    "pgd": PGDTraining,
    "free": Free,
    "fast": Fast,
}


def build_method(
    options: NaturalOptions | PGDOptions | FreeOptions | FastOptions, threat: Threat
) -> Method:
    """Return the method that the options describe, with nothing carried yet."""
    return _METHODS[options.name](options, threat)
