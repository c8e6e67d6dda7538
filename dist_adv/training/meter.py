"""Loss, accuracy and speed of training, summed on the device."""

import time
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from dist_adv.methods import Step

_HELD = 256
"""Steps that are held before they are summed."""

_Alike = tuple[int, tuple[str, ...]]
"""Steps of as many samples, with scalars of the same names."""


class Meter:
    """Loss, correct answers and samples of this rank, summed on the device; and wall time.

    scalars: what the method wants to be logged, summed likewise. Steps are held and summed
    together: one by one each would take some 15 kernels for its few numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.scalars: dict[str, Tensor] = {}
        self.held: defaultdict[_Alike, list[tuple[Tensor, list[Tensor]]]] = defaultdict(list)
        self.start()

    def start(self) -> None:
        """Count time from now."""
        self.began = time.perf_counter()

    def add(self, out: Step, y: Tensor) -> None:
        """Count one step, unless its loss is not finite; waits for nothing."""
        right = out.logits.detach().argmax(1) == y
        # Copies of what may be a method's own, on the CPU or changed by its next step.
        scalars = [each.detach().to(y.device, copy=True) for each in out.scalars.values()]
        self.held[len(y), tuple(out.scalars)].append((right, [out.loss.detach(), *scalars]))
        if sum(map(len, self.held.values())) == _HELD:
            self._sum_up()

    def _sum_up(self) -> None:
        """Add the steps that are held to the sums; waits for nothing."""
        for (n, names), steps in self.held.items():
            right = torch.stack([right for right, _ in steps])
            means = torch.stack([mean for _, means in steps for mean in means])
            means = means.double().view(len(steps), -1)
            counts = means[:, :1].isfinite()
            loss, *scalars = torch.where(counts, means * n, 0).sum(0)
            self.sums += torch.stack([loss, (right & counts).sum(), counts.sum() * n])
            for name, value in zip(names, scalars, strict=True):
                self.scalars[name] = self.scalars.get(name, 0) + value
        self.held.clear()

    def take(self, accelerator: Accelerator) -> Tensor:
        """[loss, correct, samples] of all ranks and seconds since the last call; waits for them.

        `rates` then has each rank's samples a second, until its own device was through; `means`
        the method's scalars.
        """
        self._sum_up()
        mine = torch.stack([*self.sums, *self.scalars.values()]).cpu()
        seconds = torch.tensor([time.perf_counter() - self.began], dtype=mine.dtype)
        mine = torch.cat([mine, seconds]).to(self.sums.device)
        everyone = accelerator.gather(mine[None]).cpu()
        self.rates = everyone[:, 2] / everyone[:, -1]
        totals = everyone[:, 3:-1].sum(0) / everyone[:, 2].sum()
        self.means = dict(zip(self.scalars, totals.tolist(), strict=True))
        seconds[0] = time.perf_counter() - self.began
        self.sums.zero_()
        self.scalars = {}
        self.start()
        return torch.cat([everyone[:, :3].sum(0), seconds])
