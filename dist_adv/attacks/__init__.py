"""Attacks: what they are called, projected gradient ascent, and AutoAttack with its four parts."""

from dist_adv.attacks.pgd import (
    LOSS_SCALE,
    PGD,
    Loss,
    Outcome,
    ascend,
    correct,
    cross_entropy,
    frozen,
    input_gradient,
)
from dist_adv.attacks.spec import AttackOptions, AttackSpec, attack_kind, parse_attack

__all__ = [
    "LOSS_SCALE",
    "PGD",
    "AttackOptions",
    "AttackSpec",
    "Loss",
    "Outcome",
    "ascend",
    "attack_kind",
    "correct",
    "cross_entropy",
    "frozen",
    "input_gradient",
    "parse_attack",
]
