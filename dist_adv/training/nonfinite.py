"""No update is taken from a loss or a gradient that is not finite, on whatever rank it was.

The decision is the device's, so nothing waits for it; and the gradients that DDP has averaged tell
every rank the same, so nothing is communicated. What happened is read where metrics are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@dataclass(frozen=True)
class Trouble:
    """Updates that were not taken: how many, the number of the first, the ranks it came from.

    Updates count from 1 since this start of the run. No rank is named where every loss was finite
    and a gradient was not.
    """

    count: int
    first: int
    ranks: list[int]


class NonFinite:
    """Watches the updates of a fused optimiser.

    optimizer: None where the engine leaves such updates out by itself. norm: of the gradients of
    this update, the same on every rank.

    `stop`: from the first bad update on none is taken. `skip`: bad updates are passed over, and
    what their forwards did to BatchNorm's statistics is undone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        norm: Callable[[], Tensor],
        on_nan: Literal["stop", "skip"],
        scaled: bool,
    ) -> None:
        self.optimizer, self.norm = optimizer, norm
        self.skip, self.scaled = on_nan == "skip", scaled
        statistics = [b for name, b in model.named_buffers() if "running_" in name]
        self.statistics = statistics if self.skip else []
        self.good = [buffer.clone() for buffer in self.statistics]
        self.seen = 0
        # Updates seen, bad ones among them, the first of those (0: none), and the first whose
        # loss on this very rank was not finite.
        device = next(model.parameters()).device
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

    def restart(self) -> None:
        """Start anew: the model has got other weights and statistics."""
        for buffer, good in zip(self.statistics, self.good, strict=True):
            good.copy_(buffer)

    @staticmethod
    def mark(loss: Tensor, weight: float) -> Tensor:
        """`weight`, but NaN for a loss that is not finite: multiplied with it, its gradient is NaN.

        An infinite loss may have a finite gradient of its own.
        """
        return weight + 0 * loss.detach()

    def before_update(self, loss: Tensor) -> None:
        """Between the backward pass and the optimiser's step."""
        mine = ~loss.detach().isfinite()
        # Gradients that overflow are fp16's daily bread: its scaler skips those updates, and with
        # them any that a NaN has reached. It decides update by update: `stop` takes hold where
        # trouble is read, before the next checkpoint.
        bad = mine if self.scaled else ~self.norm().isfinite()
        # Views of the counts on the device, which the sums below change in place. `self.seen`
        # is the first of them on the host, where reading it waits for nothing.
        seen, count, first, first_mine = self.counts.unbind()
        self.seen += 1
        seen += 1
        count += bad
        first += (bad & (first == 0)) * seen
        first_mine += (mine & (first_mine == 0)) * seen
        if self.optimizer:
            # A fused optimiser leaves weights and momentum alone where this is 1.
            unwanted = bad if self.skip else count > 0
            self.optimizer.found_inf = unwanted.float()  # type: ignore[attr-defined]
        for buffer, good in zip(self.statistics, self.good, strict=True):
            good.copy_(torch.where(bad, good, buffer))
            buffer.copy_(good)

    def trouble(self, accelerator: Accelerator) -> Trouble | None:
        """Return what happened so far, the same on every rank; waits for all of them."""
        everyone = accelerator.gather(self.counts[None]).tolist()
        count = max(count for _, count, _, _ in everyone)
        if not count:
            return None
        first = min(first for _, _, first, _ in everyone if first)
        ranks = [rank for rank, (_, _, _, own) in enumerate(everyone) if own == first]
        return Trouble(count, first, ranks)
