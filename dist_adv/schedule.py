"""Learning rate and momentum as pure functions of the optimiser step.

No scheduler object: nothing to save, nothing that Accelerate would step once a process.
"""

import math
from typing import Literal

Schedule = Literal["cyclic", "multistep", "cosine", "constant"]


def lr_at(schedule: Schedule, peak: float, step: int, total: int) -> float:
    """Learning rate of update number `step` (from 0) of `total`.

    cyclic: a triangle, 0 -> peak -> 0 (Wong et al. 2020, torch's CyclicLR); the first update
    has rate 0. multistep: x 0.1 at total / 2 and again at 3 total / 4 (their alternative).
    """
    done = step / total
    if schedule == "cyclic":
        return peak * (1 - abs(2 * done - 1))
    if schedule == "multistep":
        return peak * 0.1 ** (int(step >= total // 2) + int(step >= total * 3 // 4))
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


def momentum_at(base: float, cycle: bool, step: int, total: int) -> float:
    """Momentum of update number `step`: constant, or base -> base - 0.1 -> base.

    The cycle is what torch's CyclicLR does unless told otherwise (`cycle_momentum=True`), and
    so what the published Free-against-Fast runs did.
    """
    return base - 0.1 * (1 - abs(2 * step / total - 1)) if cycle else base
