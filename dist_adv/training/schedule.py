"""Learning rate and momentum as pure functions of the optimiser step.

No scheduler object: nothing to save, nothing that Accelerate would step once a process.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dist_adv import plugins
from dist_adv.config.schema import SCHEDULE_GROUP, SCHEDULES


def lr_at(
    schedule: str,
    peak: float,
    step: int,
    total: int,
    rise: float = 0.5,
    warmup: float = 0.0,
    milestones: Sequence[float] = (0.5, 0.75),
    floor: float = 0.0,
    points: Mapping[float, float] | None = None,
    epoch: float = 0.0,
) -> float:
    """Learning rate of update number `step` (from 0) of `total`, which is `epoch` epochs on.

    warmup: updates over which any rate but the cyclic one rises by equal parts to what it is
    without; the cosine is over the rest, and ends at the share `floor` of the peak.

    cyclic: a triangle, 0 -> peak -> 0, which rises for the share `rise` of the run (Wong et al.
    2020, torch's CyclicLR: one half); the first update has rate 0. multistep: x 0.1 at each of the
    milestones, which are shares of the run (half and three quarters: their alternative). linear:
    straight lines between `points`, shares of the peak by epoch.
    """
    done = step / total
    if schedule == "cyclic":
        return peak * (1 - _from_peak(done, rise))
    rate = peak
    if schedule == "multistep":
        # 0.7 of 39,100 steps is a little less than 27,370 in floating point.
        rate *= 0.1 ** sum(step >= math.floor(share * total + 1e-6) for share in milestones)
    elif schedule == "cosine":
        share = max(0, step - warmup) / max(1, total - warmup)
        rate *= floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
    elif schedule == "linear":
        assert points
        at = sorted(points)
        rate *= float(np.interp(epoch, at, [points[each] for each in at]))
    elif schedule not in SCHEDULES:
        rate *= plugins.find(schedule, SCHEDULE_GROUP, {})(done)
    return rate * (step + 1) / warmup if step + 1 < warmup else rate


def momentum_at(base: float, cycle: bool, step: int, total: int, rise: float = 0.5) -> float:
    """Momentum of update number `step`: constant, or base -> base - 0.1 -> base with the rate.

    The cycle is what torch's CyclicLR does unless told otherwise (`cycle_momentum=True`), and
    so what the published Free-against-Fast runs did.
    """
    return base - 0.1 * (1 - _from_peak(step / total, rise)) if cycle else base


def _from_peak(done: float, rise: float) -> float:
    """1 at the beginning, 0 when the share `rise` of the run is done, 1 at the end."""
    return 1 - done / rise if done < rise else (done - rise) / (1 - rise)
