"""Distributed adversarial training of image classifiers, with honest evaluation.

What a program imports from here is documented; anything else may move. `docs/extending.md` shows
methods, networks, data sets and attacks of somebody's own.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dist_adv.api import evaluate as evaluate
    from dist_adv.api import train as train
    from dist_adv.attacks import AttackOptions as AttackOptions
    from dist_adv.attacks import input_gradient as input_gradient
    from dist_adv.attacks.threat import L2 as L2
    from dist_adv.attacks.threat import Linf as Linf
    from dist_adv.attacks.threat import Threat as Threat
    from dist_adv.config import Config as Config
    from dist_adv.config import load_config as load_config
    from dist_adv.config.schema import TrackerOptions as TrackerOptions
    from dist_adv.data import Batch as Batch
    from dist_adv.data import DataOptions as DataOptions
    from dist_adv.errors import UserError as UserError
    from dist_adv.methods import ByPosition as ByPosition
    from dist_adv.methods import BySample as BySample
    from dist_adv.methods import Everywhere as Everywhere
    from dist_adv.methods import Method as Method
    from dist_adv.methods import MethodOptions as MethodOptions
    from dist_adv.methods import Net as Net
    from dist_adv.methods import Objective as Objective
    from dist_adv.methods import Step as Step
    from dist_adv.methods import Task as Task
    from dist_adv.models import ModelOptions as ModelOptions
    from dist_adv.models import load_model as load_model

_PUBLIC = {
    "attacks": ("AttackOptions", "input_gradient"),
    "attacks.threat": ("L2", "Linf", "Threat"),
    "config": ("Config", "load_config"),
    "config.schema": ("TrackerOptions",),
    "data": ("Batch", "DataOptions"),
    "errors": ("UserError",),
    "methods": (
        *("ByPosition", "BySample", "Everywhere", "Method", "MethodOptions", "Net", "Objective"),
        *("Step", "Task"),
    ),
    "models": ("ModelOptions", "load_model"),
    "api": ("evaluate", "train"),
}
_HOMES = {name: home for home, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    """Import torch only when somebody asks for what needs it: `dist-adv --help` stays instant."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"dist_adv.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dist_adv' has no attribute {name!r}")
