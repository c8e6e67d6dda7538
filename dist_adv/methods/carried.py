"""What a method carries from batch to batch, by kind: saved, and restored at any number of ranks.

ByPosition: a row a position of the global batch (Free's perturbation). BySample: a row an image of
the data set (a table of perturbations). Everywhere: the same on every rank (a universal one).
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from dist_adv.errors import UserError


class ByPosition:
    """Rows of this rank's positions of the global batch, the first [:n] in a short batch.

    Zero at the very start, never reset.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def read(self, like: Tensor) -> Tensor:
        """Return the rows for a batch of the shape of `like` (n, ...)."""
        if self.rows is None:
            self.rows = like.new_zeros(like.shape)
        return self.rows[: len(like)]

    def write(self, rows: Tensor) -> None:
        """Keep rows of the shape that was read."""
        assert self.rows is not None
        self.rows[: len(rows)] = rows.detach()


class BySample:
    """A row an image of the data set, whole on every rank; each rank writes those of its batches.

    samples: images of the training split (`task.samples`); shape: of a row. Zero at the very
    start. Others' rows arrive when a checkpoint is saved, at the end of each epoch at least: in
    an epoch each sample comes once, so that none is read before it has.

    Raises UserError for a table that this device cannot hold.
    """

    def __init__(
        self, samples: int, shape: torch.Size, device: torch.device, dtype: torch.dtype
    ) -> None:
        _check_size(samples * shape.numel() * dtype.itemsize, device)
        # As bytes they are summed exactly in any type, -0 included.
        self.rows = torch.zeros(samples, *shape, dtype=dtype, device=device)
        self.written = torch.zeros(samples, dtype=torch.bool, device=device)

    def read(self, samples: Tensor) -> Tensor:
        """Return a copy of the rows of these samples, int64 (n,)."""
        return self.rows[samples]

    def write(self, samples: Tensor, rows: Tensor) -> None:
        """Keep the rows of these samples, which are of this rank's batch."""
        self.rows[samples] = rows.detach().to(self.rows.dtype)
        self.written[samples] = True

    def merge(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Bring in what other ranks have written since the last call. Every rank calls this."""
        anyone = sum_over_ranks(self.written.int()) > 0
        part = max(1, _PART * len(self.rows) // max(1, self.rows.nbytes))
        for first in range(0, len(self.rows), part):
            rows, mine = self.rows[first : first + part], self.written[first : first + part]
            own = rows.view(len(rows), -1).view(torch.uint8) * mine[:, None]
            told = sum_over_ranks(own).view(rows.dtype).view_as(rows)
            rows[anyone[first : first + part]] = told[anyone[first : first + part]]
        self.written.zero_()


class Everywhere:
    """A tensor that is the same on every rank: changed by `net.sum_over_ranks` of shares alone."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


Carried = ByPosition | BySample | Everywhere

_PART = 2**26  # bytes of a table that are summed at once


def _check_size(size: int, device: torch.device) -> None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > free:
        raise UserError(
            f"method: its table of a row a training image takes {size:,} bytes and this "
            f"{'GPU has' if device.type == 'cuda' else 'machine has'} {free:,}; use fewer or "
            f"smaller images, or rows of fewer bytes (int8, float16)"
        )
