"""The images to measure on, in a fixed random order shared by the ranks."""

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from dist_adv import rng
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.distributed.collectives import share_evenly
from dist_adv.evaluation.tally import Tally


def subset(n: int, limit: int | None) -> Tensor:
    """Numbers of the samples that are measured: the first `limit` in a fixed random order of n."""
    return rng.permutation(rng.stream_key("subset"), n)[:limit]


class Images:
    """This rank's share of the images to measure on, in chunks on the device.

    The first `options.limit` images of a fixed random order, so that a folder sorted by class
    gives a balanced set, whatever the ranks. Rank r takes r, r + W, r + 2 W, ...: each image once,
    and after each round of chunks a beginning of that order is done.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: EvalOptions,
        accelerator: Accelerator,
        between: Callable[[], None],
    ) -> None:
        self.order = subset(len(dataset), options.limit)
        self.n = len(self.order)
        self.dataset, self.device = dataset, accelerator.device
        self.accelerator, self.seed = accelerator, options.seed
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.between, self.round = between, options.batch_size * self.ranks
        self.key = rng.stream_key(options.seed, "attack")

    def chunks(
        self, tally: Tally, together: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x (n, C, H, W) in [0, 1], y (n,), keys (n,) of each chunk that `tally` does not have.

        together: a chunk in every round, of no images where the others' shares are larger by one.
        """
        for start in range(tally.done, self.n, self.round):
            self.between()
            samples = self.order[start : start + self.round][self.rank :: self.ranks]
            if together or len(samples):
                yield self.load(samples)
            tally.close_round(min(self.n, start + self.round))

    def share(self, rows: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return this rank's part of what all ranks have, alike many each; every rank calls this.

        rows: tensors (n, ...) of this rank, n as it comes.
        """
        return [_channels_last(each) for each in share_evenly(self.accelerator, rows)]

    def load(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.dataset.images[samples].to(self.device).to(torch.get_default_dtype()).div_(255)
        y = self.dataset.labels[samples].to(self.device)
        keys = rng.sample_keys(self.key, samples.to(self.device))
        return _channels_last(x), y, keys


def _channels_last(rows: Tensor) -> Tensor:
    """Images as networks are fastest with them; what is none is as it was."""
    return rows.contiguous(memory_format=torch.channels_last) if rows.dim() == 4 else rows
