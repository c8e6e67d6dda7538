"""AAER: N-FGSM without steps that lower the loss (Lin et al. 2023)."""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dist_adv.attacks import cross_entropy
from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import Net, Objective, Step
from dist_adv.methods.n_fgsm import FromNoise, NFGSMOptions
from dist_adv.options import Real


class AAEROptions(NFGSMOptions):
    """strength: lambda_3 of the paper, 0.15 for noise of 2 eps."""

    name: str = "aaer"
    strength: Annotated[Real, Field(ge=0, title="lambda")] = 0.15


class AAER(FromNoise[AAEROptions]):
    """min CE(z', y) + lambda (#a / B) max(v(a) - v(others), 0), z' at N-FGSM's x + d'.

    a: samples whose loss the step has lowered, which catastrophic overfitting begins with; v: the
    mean over them, or over the others (a constant), of sum_k (z_k - z'_k)^2, z at the noise. Of
    the global batch: the published loop takes both of each rank's share. The terms of the losses
    themselves, which the paper has, are without a gradient in the published code, and not here.
    """

    title = "AAER"
    about = (
        "On adversarial images made in one step from strong noise, with a penalty on samples "
        "whose loss that step has lowered."
    )

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        y = batch.y
        before, delta = self.attack(net, batch, threat)

        def objective() -> Step:
            logits = net(batch.x + delta)
            abnormal = cross_entropy(logits.detach(), y) < cross_entropy(before, y)
            moved = (before - logits).square().sum(1)
            penalty, share = self._penalty(net, batch, abnormal.to(moved.dtype), moved)
            loss = self.task.loss(logits, y) + self.options.strength * penalty
            return Step(loss, logits, {"abnormal": share, "penalty": penalty.detach()})

        yield objective

    @staticmethod
    def _penalty(net: Net, batch: Batch, abnormal: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the penalty, and the share of abnormal samples; () each.

        Scaled so that the engine's mean over ranks, weighted by their shares, is the penalty.
        """
        normal = 1 - abnormal
        told = net.sum_over_ranks(
            torch.stack(
                [abnormal.sum(), normal.sum(), (abnormal * moved).sum(), (normal * moved).sum()]
            )
        )
        counts, sums = told[:2], told[2:]
        means = sums / counts.clamp_min(1)
        counted = (counts > 0).all() & (means[0] > means[1])
        return (counted * abnormal * (moved - means[1])).mean(), counts[0] / batch.total
