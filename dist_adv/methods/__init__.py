"""Training methods, one file each, found by what they define: a new one is a file here."""

from dist_adv.methods.base import Method, MethodOptions, Net, Objective, Step, Task
from dist_adv.methods.carried import ByPosition, BySample, Carried, Everywhere
from dist_adv.methods.registry import GROUP, MethodChoice, build_method, find_method

__all__ = [
    "GROUP",
    "ByPosition",
    "BySample",
    "Carried",
    "Everywhere",
    "Method",
    "MethodChoice",
    "MethodOptions",
    "Net",
    "Objective",
    "Step",
    "Task",
    "build_method",
    "find_method",
]
