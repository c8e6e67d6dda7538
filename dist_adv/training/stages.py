"""The stages of a run, in each of which nothing is by epoch, and which batch is in which epoch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dist_adv.config import Config
from dist_adv.data import Dataset
from dist_adv.data.loader import count_batches
from dist_adv.training.checks import check_divides


@dataclass(frozen=True)
class Stage:
    """Epochs from `first` up to, and without, `end`; counted from 0.

    config: as it is in them. batches: of one of them. smallest_share: of a batch that a rank gets,
    or takes at once.
    """

    first: int
    end: float
    config: Config
    batches: int
    smallest_share: int


class Stages:
    """All of a run's stages; one where nothing is by epoch. The last one has no end.

    Raises UserError where some batch would leave a rank without an image, or cannot be parted.
    """

    def __init__(self, configs: Mapping[int, Config], data: Dataset, ranks: int) -> None:
        firsts = sorted(configs)
        self.all = []
        for first, end in zip(firsts, [*firsts[1:], math.inf], strict=True):
            config = configs[first]
            size, drop_last = config.train.batch_size, config.data.drop_last
            mixes, parts = config.data.augmentation().mixes, config.train.accumulate
            check_divides(size, parts, ranks)
            batches, share = count_batches(data, size, drop_last, ranks, mixes)
            self.all.append(Stage(first, end, config, batches, share // parts))

    def at(self, epoch: int) -> Stage:
        return next(stage for stage in self.all if epoch < stage.end)

    def batches_until(self, epochs: float) -> float:
        """Return how many batches so many epochs have; a whole number for whole epochs."""
        begun = [stage for stage in self.all if stage.first < epochs]
        return sum((min(stage.end, epochs) - stage.first) * stage.batches for stage in begun)

    def epochs_after(self, batches: float) -> float:
        """Return how many epochs so many batches are."""
        for stage in self.all:
            epochs = stage.first + batches / stage.batches
            if epochs < stage.end:
                break
            batches -= (stage.end - stage.first) * stage.batches
        return epochs
