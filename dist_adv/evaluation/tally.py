"""Sums over the images done, of all ranks, on disk where an interruption may come."""

import time

import torch
from accelerate import Accelerator
from torch import Tensor

from dist_adv.distributed.collectives import sum_over_ranks
from dist_adv.evaluation.unfinished import Entry, Unfinished


class Tally:
    """Sums over the images done, of this rank and of all; on disk where there is an `Unfinished`.

    done: how many images, from the beginning of their order, all ranks are through with.
    """

    def __init__(
        self, accelerator: Accelerator, attack: str, size: int, unfinished: Unfinished | None
    ) -> None:
        self.accelerator, self.attack, self.unfinished = accelerator, attack, unfinished
        found = unfinished.find(attack, size) if unfinished else None
        before = found or Entry(sums=[0.0] * size)
        self.done, self.seconds, self.messages = before.done, before.seconds, before.messages
        self.sums = torch.tensor(before.sums, dtype=torch.float64)
        self.mine = torch.zeros(size, dtype=torch.float64, device=accelerator.device)
        self.began = time.perf_counter()

    def add(self, *numbers: Tensor | int) -> None:
        parts = [torch.as_tensor(n, device=self.mine.device).double() for n in numbers]
        self.mine += torch.stack(parts)

    def close_round(self, done: int) -> None:
        self.done = done
        if self.unfinished:
            self._collect()
            entry = Entry(
                done=done,
                sums=self.sums.tolist(),
                seconds=self.elapsed(),
                messages=self.messages,
            )
            self.unfinished.keep(self.attack, entry)

    def totals(self) -> list[float]:
        """Return the sums over all ranks."""
        self._collect()
        return self.sums.tolist()

    def elapsed(self) -> float:
        """Seconds of work on this attack, those before an interruption included."""
        return self.seconds + time.perf_counter() - self.began

    def _collect(self) -> None:
        self.sums += sum_over_ranks(self.accelerator, self.mine).cpu()
        self.mine.zero_()
