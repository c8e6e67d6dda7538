"""Names of attacks: natural, fgsm, pgd-K, pgd-K-R, autoattack, its four alone, and others' own."""

import re
from dataclasses import dataclass
from typing import Any

from dist_adv import plugins
from dist_adv.options import Options
from dist_adv.text import nearest

GROUP = "dist_adv.attacks"
_SIMPLE = ("natural", "noise", "fgsm")
ENSEMBLE = ("apgd-ce", "apgd-t", "fab-t", "square")
"""What AutoAttack consists of, in its order; each is an attack by itself, too."""


class AttackOptions(Options):
    """The options of somebody's own attack, with their defaults."""


@dataclass(frozen=True)
class AttackSpec:
    """A parsed name. `steps` counts for FGSM and PGD alone.

    kind: natural, noise, fgsm, pgd, apgd-ce, apgd-t, fab-t, square, autoattack or other.
    """

    name: str
    kind: str
    steps: int
    restarts: int


def parse_attack(name: str) -> AttackSpec:
    """`pgd-20` is 20 steps from one random start, `pgd-50-10` 50 steps from each of 10.

    Raises ValueError for anything else, saying what was meant.
    """
    if name in (*_SIMPLE, "autoattack", *ENSEMBLE):
        return AttackSpec(name, name, int(name == "fgsm"), 1)
    if ":" in name or name in plugins.installed(GROUP):
        attack_kind(name)
        return AttackSpec(name, "other", 0, 1)
    match = re.fullmatch(r"pgd-([0-9]{1,6})(?:-([0-9]{1,6}))?", name)
    if match is None:
        hint = nearest(name, [*_SIMPLE, "pgd-10", "pgd-50", "pgd-50-10", "autoattack", *ENSEMBLE])
        raise ValueError(f"{name!r} is no attack (pgd-STEPS or pgd-STEPS-RESTARTS){hint}")
    steps, restarts = int(match[1]), int(match[2] or 1)
    if steps == 0 or restarts == 0:
        raise ValueError(f"{name!r} needs at least 1 step and 1 restart, for example 'pgd-10'")
    return AttackSpec(name, "pgd", steps, restarts)


def attack_kind(name: str) -> tuple[Any, type[AttackOptions]]:
    """Return somebody's own attack and its options. Raises ValueError saying why there is none."""
    found = plugins.find(name, GROUP, {})
    return found, plugins.options_of(name, found, AttackOptions)
