"""What an evaluation gives: figures with their intervals, and example images."""

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Result:
    """What one attack on one network found.

    correct, n: images that are right under it, of how many; loss: the mean cross-entropy;
    seconds: of the attack that it was measured in, `measured_in`, which may be a longer one
    (PGD-10 is measured on the way to PGD-50); settings: as in results.jsonl; flags: why the figure
    should not be trusted.
    """

    attack: str
    correct: int
    n: int
    loss: float | None
    seconds: float
    measured_in: str
    settings: dict[str, Any]
    flags: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """The share of images that are right, in [0, 1]."""
        return self.correct / self.n

    def record(self) -> dict[str, Any]:
        """Return the line of results.jsonl."""
        return {
            "attack": self.attack,
            "accuracy": self.accuracy,
            "correct": self.correct,
            "n": self.n,
            "ci95": wilson(self.correct, self.n),
            "loss": self.loss,
            **self.settings,
            "seconds": round(self.seconds, 3),
            "measured_in": self.measured_in,
            "flags": self.flags,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }


@dataclass(frozen=True)
class Examples:
    """A few images before and after the strongest attack, (k, C, H, W) in [0, 1], labels (k,)."""

    attack: str
    classes: list[str]
    clean: Tensor
    adversarial: Tensor
    label: Tensor
    clean_prediction: Tensor
    adversarial_prediction: Tensor


def wilson(correct: int, n: int) -> list[float]:
    """95 % Wilson score interval of a proportion (Wilson 1927)."""
    z = 1.959964
    p, d = correct / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / d
    half = z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]
