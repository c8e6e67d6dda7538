"""Attacks: what they are called, and one implementation of projected gradient ascent."""

from dist_adv.attacks.pgd import PGD, Loss, Outcome, ascend, correct, frozen
from dist_adv.attacks.spec import AttackSpec, parse_attack

__all__ = ["PGD", "AttackSpec", "Loss", "Outcome", "ascend", "correct", "frozen", "parse_attack"]
