"""How far a run is, and which epoch was its best."""

from dataclasses import dataclass


@dataclass
class Clock:
    """Epochs done, batches done of the next epoch, optimiser steps, seconds.

    `seconds` is wall time of training alone: no evaluation, no checkpoint, no set-up.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0

    def epochs(self, batches: int) -> float:
        """Return the epochs so far, of `batches` batches each; no replays."""
        return self.epoch + self.batch / batches


@dataclass(frozen=True)
class Best:
    """The epoch with the highest robust accuracy on held-out images."""

    step: int
    epoch: float
    accuracy: float
