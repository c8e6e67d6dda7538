"""No update is taken from a loss or a gradient that is not finite, on whatever rank it was.

The decision is the device's, so nothing waits for it; and the gradients that DDP has averaged tell
every rank the same, so nothing is communicated. What happened is read where metrics are; until then
flags and losses of updates are held, which takes no kernel.
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


_HELD = 256
"""Updates whose flags and losses are held before they are counted, in some 30 kernels."""


class NonFinite:
    """Watches the updates of a fused optimiser.

    optimizer: None where the engine leaves such updates out by itself. flag: sets a float32 0 to 1
    where the gradients of this update are not finite, the same on every rank.

    `stop`: from the first bad update on none is taken. `skip`: bad updates are passed over, and
    what their forwards did to BatchNorm's statistics is undone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        flag: Callable[[Tensor], None],
        on_nan: Literal["stop", "skip"],
        scaled: bool,
    ) -> None:
        self.optimizer, self.flag = optimizer, flag
        self.skip, self.scaled = on_nan == "skip", scaled
        statistics = [b for name, b in model.named_buffers() if "running_" in name]
        self.statistics = statistics if self.skip else []
        self.seen = 0
        # Updates counted, bad ones among them, the first of those (0: none), and the first whose
        # loss on this very rank was not finite.
        device = next(model.parameters()).device
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)
        self.stopped = torch.zeros((), dtype=torch.float32, device=device)
        self._hold_anew()
        self.restart()

    def _hold_anew(self) -> None:
        # Other memory than before: the optimiser has yet to read the last update's flag.
        self.flags = torch.zeros(_HELD, dtype=torch.float32, device=self.counts.device)
        self.losses: list[Tensor] = []

    def restart(self) -> None:
        """Start anew: the model has got other weights and statistics."""
        self.good = self._flat() if self.statistics else None

    def _flat(self) -> Tensor:
        return torch.cat([buffer.flatten() for buffer in self.statistics])

    def _take_back(self, bad: Tensor) -> None:
        """Give BatchNorm, where this update is bad, the statistics of the last good one."""
        assert self.good is not None
        self.good = torch.where(bad > 0, self.good, self._flat())
        pieces = self.good.split([buffer.numel() for buffer in self.statistics])
        good = [piece.view_as(each) for piece, each in zip(pieces, self.statistics, strict=True)]
        torch._foreach_copy_(self.statistics, good)

    @staticmethod
    def mark(loss: Tensor, weight: float) -> Tensor:
        """`weight`, but NaN for a loss that is not finite: its gradient times this is NaN, too.

        An infinite loss may have a finite gradient of its own.
        """
        return torch.rsub(loss.detach(), weight, alpha=0)  # weight - 0 * loss

    def before_update(self, loss: Tensor) -> None:
        """Between the backward pass and the optimiser's step."""
        loss = loss.detach()
        bad = self.flags[len(self.losses)]
        # Gradients that overflow are fp16's daily bread: its scaler skips those updates, and with
        # them any that a NaN has reached. It decides update by update: `stop` takes hold where
        # trouble is read, before the next checkpoint.
        if self.scaled:
            bad.copy_(~loss.isfinite())
        else:
            self.flag(bad)
        if self.optimizer:
            # A fused optimiser leaves weights and momentum alone where this is 1.
            unwanted = bad if self.skip else self.stopped.logical_or_(bad)
            self.optimizer.found_inf = unwanted  # type: ignore[attr-defined]
        if self.statistics:
            self._take_back(bad)
        self.seen += 1
        self.losses.append(loss)
        if len(self.losses) == _HELD:
            self._count()

    def _count(self) -> None:
        """Count the updates that are held; waits for nothing."""
        updates = len(self.losses)
        bad = self.flags[:updates] > 0
        mine = ~torch.stack(self.losses).isfinite()
        seen, count, first, first_mine = self.counts.unbind()  # views: changed in place
        for which, number in ((bad, first), (mine, first_mine)):
            # argmax: of several the first.
            number += (number == 0) * which.any() * (seen + 1 + which.int().argmax())
        seen += updates
        count += bad.sum()
        self._hold_anew()

    def trouble(self, accelerator: Accelerator) -> Trouble | None:
        """Return what happened so far, the same on every rank; waits for all of them."""
        if self.losses:
            self._count()
        everyone = accelerator.gather(self.counts[None]).tolist()
        count = max(count for _, count, _, _ in everyone)
        if not count:
            return None
        first = min(first for _, _, first, _ in everyone if first)
        ranks = [rank for rank, (_, _, _, own) in enumerate(everyone) if own == first]
        return Trouble(count, first, ranks)
