"""Counts the operators that torch dispatches, by where in dist_adv they come from."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dist_adv

ROOM = Path(dist_adv.__file__).parent
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def launches(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator computes: it writes to an argument, or returns a tensor of its own.

    By its schema: views (`view`, `expand`, `unbind`, `detach`, ...) return arguments' memory under
    another name. Memory that is allocated and not filled is not computed either.
    """
    schema = operator._schema
    if schema.name.split("::")[1] in ALLOCATIONS:
        return False
    written = any(each.alias_info and each.alias_info.is_write for each in schema.arguments)
    made = any(each.alias_info is None and "Tensor" in str(each.type) for each in schema.returns)
    return written or made


class Operators(TorchDispatchMode):
    """`with Operators() as seen:` counts those that launch within, on whatever device.

    by_origin: (file and function, operator) to a number. Backward passes come from where they are
    asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_origin: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if launches(func):
            self.by_origin[_origin(), str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.by_origin.total()

    def __str__(self) -> str:
        origins: dict[str, dict[str, int]] = {}
        for (origin, name), count in self.by_origin.items():
            origins.setdefault(origin, {})[name] = count
        return "\n".join(
            f"{sum(names.values()):5d}  {origin}: "
            + ", ".join(f"{name} {count}" for name, count in names.items())
            for origin, names in origins.items()
        )


def _origin() -> str:
    """Return the innermost function of dist_adv that is running, networks' layers left out."""
    frame = sys._getframe(2)
    while frame.f_back:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOM) and not path.is_relative_to(ROOM / "models"):
            return f"{path.relative_to(ROOM)} {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"
