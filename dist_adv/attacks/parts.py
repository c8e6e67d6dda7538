"""As many images at once as fit into memory."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

log = logging.getLogger("dist_adv")


class Parts:
    """Gives work the images in parts: halves of what was too much for the GPU's memory.

    most: images at once, as far as that is known. Results of attacks do not depend on it.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most

    def __call__(self, work: Callable[..., T], *rows: Tensor) -> list[T]:
        """Return the work's results for each part of rows (n, ...), of which n is at least 1.

        Raises torch.OutOfMemoryError where a single image is too much.
        """
        results: list[T] = []
        done, n = 0, len(rows[0])
        while done < n:
            size = min(self.most or n, n)
            result = self._try(work, [each[done : done + size] for each in rows])
            if result is None:
                self.most = size // 2
                log.info("%d images at once are too much for this GPU: %d now", size, self.most)
                continue
            results.append(result)
            done += size
        return results

    @staticmethod
    def _try(work: Callable[..., T], rows: list[Tensor]) -> T | None:
        """Return None where memory was too little, with what it had taken given back."""
        try:
            return work(*rows)
        except torch.OutOfMemoryError:
            if len(rows[0]) == 1:
                raise
        torch.cuda.empty_cache()  # after the exception, whose frames hold tensors
        return None
