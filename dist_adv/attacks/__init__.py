"""Attacks: what they are called, and one implementation of projected gradient ascent."""

from dist_adv.attacks.pgd import PGD, Loss, Outcome, ascend, frozen
from dist_adv.attacks.spec import Attack, parse_attack

__all__ = ["PGD", "Attack", "Loss", "Outcome", "ascend", "frozen", "parse_attack"]
