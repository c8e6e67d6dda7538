"""GradAlign: FGSM with aligned input gradients (Andriushchenko and Flammarion 2020)."""

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_adv.attacks import LOSS_SCALE, cross_entropy, input_gradient
from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import Guard, Method, MethodOptions, Net, Objective, Step
from dist_adv.options import Real


class GradAlignOptions(MethodOptions):
    """strength: lambda of the paper, which is 0.2 at 8/255 and grows with eps (2.0 at 16/255)."""

    name: str = "gradalign"
    strength: Annotated[Real, Field(ge=0, title="lambda")] = 0.2
    guard: Guard = "warn"


class GradAlign(Method[GradAlignOptions]):
    """min CE(f(x + eps sign g(x)), y) + lambda (1 - mean cos(g(x), g(x + U(-eps, eps)))).

    g is the input gradient of the cross-entropy, in train mode. g(x) is a constant: as the authors
    found, differentiating one of the two is enough. Samples of which a gradient is exactly 0 have
    no angle and do not count.
    """

    title = "GradAlign"
    about = (
        "On adversarial images made in one step, and on input gradients that point the same way "
        "all over the ball, which keeps one step from being misled."
    )
    needs = frozenset({"double backward"})
    norms = ("linf",)
    soft_labels = True

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, y = batch.x, batch.y
        zero = torch.zeros_like(x)
        with net.frozen() as model:
            _, here = input_gradient(model, x, zero, lambda z: cross_entropy(z, y))
        delta = threat.project(threat.ascend(zero, here, threat.eps), x)
        noise = threat.random(batch.keys, x.shape)

        def objective() -> Step:
            near = (x + noise).requires_grad_()
            (there,) = torch.autograd.grad(
                LOSS_SCALE * cross_entropy(net(near), y).sum(), near, create_graph=True
            )
            aligned = self._mean_cosine(net, batch, here, there)
            logits = net(x + delta)
            loss = self.task.loss(logits, y) + self.options.strength * (1 - aligned)
            return Step(loss, logits, {"alignment": aligned.detach()})

        yield objective

    def _mean_cosine(self, net: Net, batch: Batch, here: Tensor, there: Tensor) -> Tensor:
        """Return this rank's part of the mean cosine over the global batch's samples that count.

        Scaled so that the engine's mean over ranks, weighted by their shares, is that mean.
        """
        here, there = here.flatten(1), there.flatten(1)
        counted = ((here != 0).any(1) & (there != 0).any(1)).to(here.dtype)
        of = net.sum_over_ranks(counted.sum()).clamp_min(1)
        cosines = F.cosine_similarity(here, there, dim=1, eps=1e-12)
        return (counted * cosines).mean() * (batch.total / of)
