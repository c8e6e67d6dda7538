"""Loss, accuracy and speed of training, summed on the device."""

import time

import torch
from accelerate import Accelerator
from torch import Tensor

from dist_adv.methods import Step


class Meter:
    """Loss, correct answers and samples of this rank, summed on the device; and wall time.

    scalars: what the method wants to be logged, summed likewise.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.scalars: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Count time from now."""
        self.began = time.perf_counter()

    def add(self, out: Step, y: Tensor) -> None:
        """Count one step, unless its loss is not finite; waits for nothing."""
        n = len(y)
        correct = (out.logits.detach().argmax(1) == y).sum()
        loss = out.loss.detach().double() * n
        step = torch.stack([loss, correct, torch.full_like(correct, n)])
        counts = loss.isfinite()
        self.sums += torch.where(counts, step, 0)
        for name, mean in out.scalars.items():
            value = torch.where(counts, mean.detach().double() * n, 0)
            self.scalars[name] = self.scalars.get(name, 0) + value

    def take(self, accelerator: Accelerator) -> Tensor:
        """[loss, correct, samples] of all ranks and seconds since the last call; waits for them.

        `rates` then has each rank's samples a second, until its own device was through; `means`
        the method's scalars.
        """
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
