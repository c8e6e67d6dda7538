"""The lines of metrics.jsonl that training writes."""

from typing import Any, Literal

from torch import Tensor

from dist_adv.errors import RunFailure
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter


def line(kind: Literal["train", "epoch"], learner: Learner, sums: Tensor) -> dict[str, Any]:
    """Return a line from a meter's sums, of the last batches (`train`) or of a whole epoch.

    Raises RunFailure where every update was skipped.
    """
    loss, correct, n, seconds = sums.tolist()
    if n == 0:
        raise RunFailure(f"no update of epoch {learner.epochs:g} was finite: nothing is learnt")
    lr, momentum = learner.lr_and_momentum(learner.clock.step - 1)
    prefix = "train_" if kind == "epoch" else ""
    return {
        "kind": kind,
        "epoch": round(learner.epochs, 4),
        "step": learner.clock.step,
        f"{prefix}loss": loss / n,
        f"{prefix}accuracy": correct / n,
        "lr": lr,
        "momentum": momentum,
        "images_per_s": n / learner.method.steps_per_batch / seconds,
        "epoch_seconds" if kind == "epoch" else "lap_seconds": seconds,
        "seconds": learner.clock.seconds,
        **({"skipped_updates": learner.skipped} if learner.skipped else {}),
    }


def speeds(learner: Learner, meter: Meter) -> dict[str, float]:
    """Return the speed of the slowest and of the fastest rank.

    They wait for each other's gradients: what differs is their share of a batch, and what they do
    after the last exchange.
    """
    rates = meter.rates / learner.method.steps_per_batch
    return {
        "rank_images_per_s_min": rates.min().item(),
        "rank_images_per_s_max": rates.max().item(),
    }
