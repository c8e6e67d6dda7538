"""The guard against catastrophic overfitting: two rules for what an epoch did to robust accuracy.

In catastrophic overfitting a model learns to mislead single-step attacks: accuracy under PGD
falls while accuracy under FGSM stays or rises. A high learning rate lowers both for an epoch or
two, and recovers.

`gap`, the default: after every epoch PGD-5 and FGSM accuracy on the same training images, not
augmented. The epoch has collapsed where, since the most robust epoch so far, PGD-5 accuracy fell,
and fell behind FGSM accuracy, each by more than the noise of so many images.
benchmarks/guard.py finds how often this is wrong.

With `gap` comes an early sign, which stops nothing: the cosine of input gradients at an image and
where a step of the full radius leads from there. A loss that bends on so short a way is what lets a
model mislead that step.

`wong`, of Wong et al. 2020, section 5.4: PGD-5 accuracy on an epoch's first training batch fell by
more than 0.2 since the epoch before. Two batches of 64 differ by that in one healthy epoch of 80:
their difference has a standard deviation of up to 0.088. Wong et al. measure in train mode.

Both measure in eval mode and fp32, so measuring moves no BatchNorm statistics.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_adv.attacks import PGD
from dist_adv.attacks.threat import Threat
from dist_adv.config import EvalOptions
from dist_adv.data import Batch, Dataset
from dist_adv.distributed.collectives import sum_over_ranks
from dist_adv.evaluation.alignment import alignment
from dist_adv.evaluation.evaluate import Supervision, evaluate
from dist_adv.evaluation.images import Images, subset
from dist_adv.evaluation.tally import Tally
from dist_adv.methods import MethodOptions
from dist_adv.training.clock import Clock

log = logging.getLogger("dist_adv")

SAMPLE = 512
"""Training images that `gap` measures, or all where there are fewer."""
SIGMAS = 4.0
"""Of the sample's noise: a one-sided level of 3.2e-5 for two given epochs."""
FALL = 0.2
BENT = 0.2
"""The alignment below which the guard speaks (benchmarks/results/2026-11-27-alignment.md)."""


@dataclass(frozen=True)
class Measured:
    """An epoch, on n training images: accuracy under PGD-5 and, by the rule `gap`, under FGSM.

    chance: the share of the most frequent class, which a constant answer keeps under any attack.
    alignment: by the rule `gap`, the mean of `alignment`; no part of what is compared.
    """

    n: int
    pgd: float
    fgsm: float | None = None
    chance: float = 0.0
    alignment: float | None = field(default=None, compare=False)

    def collapsed(self, before: "Measured") -> bool:
        """Compare with an earlier epoch, by the rule that both were measured for."""
        fall = before.pgd - self.pgd
        if self.fgsm is None or before.fgsm is None:
            return fall > FALL
        behind = fall - (before.fgsm - self.fgsm)
        # As of two samples. They are one, on which the difference of two epochs varies less.
        mean = (before.pgd + self.pgd) / 2
        noise = math.sqrt(2 * mean * (1 - mean) / self.n)
        return before.pgd > self.chance and min(fall, behind) > SIGMAS * noise

    def reference(self, before: "Measured | None") -> "Measured":
        """Choose what the next epoch is compared with.

        The most robust epoch, so that a slow collapse adds up, or the last by the rule `wong`. A
        collapsed epoch, so that a collapse is said once.
        """
        if before is None or self.fgsm is None or self.collapsed(before):
            return self
        return max(before, self, key=lambda each: each.pgd)

    @property
    def bent(self) -> bool:
        """Whether the loss bends within the ball."""
        return self.alignment is not None and self.alignment < BENT

    def since(self, before: "Measured") -> str:
        """Say what has changed."""
        text = f"PGD-5 accuracy on training images went from {before.pgd:.1%} to {self.pgd:.1%}"
        if self.fgsm is None or before.fgsm is None:
            return text
        return f"{text}, FGSM accuracy from {before.fgsm:.1%} to {self.fgsm:.1%}"

    def record(self) -> dict[str, float]:
        """Name the figures as metrics.jsonl and checkpoints do."""
        found = {
            "guard_accuracy": self.pgd,
            "guard_fgsm_accuracy": self.fgsm,
            "guard_alignment": self.alignment,
        }
        return {name: value for name, value in found.items() if value is not None}


class Guard:
    """What a run does about collapse, and what it remembers: `warn` of it, or `stop` before it.

    reference: the epoch that the next is compared with, but for its alignment, which is the last
    epoch's. good: with `stop`, when and with which weights the last good epoch ended. stopped:
    collapse has ended the run.
    """

    def __init__(self, options: MethodOptions) -> None:
        self.mode, self.rule = options.guard, options.guard_rule
        self.reference: Measured | None = None
        self.good: tuple[Clock, dict[str, Tensor]] | None = None
        self.stopped = False

    def look(
        self, now: Measured, clock: Clock, batches: int, model: nn.Module
    ) -> dict[str, float | bool]:
        """Compare an epoch that has ended with its reference, and return its part of metrics.jsonl.

        `stop` puts the weights of the last good epoch into `model`, which has those of this one.
        """
        before = self.reference
        tripped = before is not None and now.collapsed(before)
        self.reference = replace(now.reference(before), alignment=now.alignment)
        epoch = clock.epochs(batches)
        if before and tripped:
            log.warning("catastrophic overfitting in epoch %g: %s", epoch, now.since(before))
        elif now.bent and not (before and before.bent):
            log.warning(
                "the loss bends within the ball in epoch %g (the cosine of input gradients at both "
                "ends of a step is %.2f): catastrophic overfitting is near, or has begun; a "
                "shorter step or more noise (n-fgsm) may help",
                epoch,
                now.alignment,
            )
        if self.mode == "stop" and not tripped:
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.good = replace(clock), weights
        elif self.mode == "stop" and self.good:
            kept, weights = self.good
            model.load_state_dict(weights)
            self.stopped = True
            log.warning("stopped; the weights of epoch %g are kept", kept.epochs(batches))
        return now.record() | {"guard_tripped": tripped}


def on_sample(
    model: nn.Module,
    data: Dataset,
    threat: Threat,
    accelerator: Accelerator,
    batch_size: int,
    between: Callable[[], None],
) -> Measured:
    """Measure a model on `SAMPLE` training images, the same in every epoch and at any ranks.

    Args as of `evaluate`, whose chunks have `batch_size` images a rank.
    """
    options = EvalOptions(attacks=["pgd-5", "fgsm"], limit=SAMPLE, batch_size=batch_size)
    (pgd, fgsm), _ = evaluate(
        model, data, threat, options, accelerator, Supervision(between=between)
    )
    tally = Tally(accelerator, "alignment", 1, None)
    for x, y, _ in Images(data, options, accelerator, between).chunks(tally):
        tally.add(alignment(model, x, y, threat).sum())
    counts = data.labels[subset(len(data), SAMPLE)].bincount()
    chance, aligned = counts.max().item() / pgd.n, tally.totals()[0] / pgd.n
    return Measured(pgd.n, pgd.accuracy, fgsm.accuracy, chance, aligned)


def on_batch(model: nn.Module, batch: Batch, threat: Threat, accelerator: Accelerator) -> Measured:
    """Measure a model on a global batch: PGD-5, step eps / 4, one random start."""
    outcome = PGD(5, threat.eps / 4)(model.eval(), batch.x, batch.y, threat, batch.keys)
    counts: Tensor = torch.stack(
        [outcome.survives(5, 1).sum(), torch.tensor(len(batch.y), device=batch.y.device)]
    )
    correct, n = sum_over_ranks(accelerator, counts).tolist()
    return Measured(n, correct / n)
