"""PGD adversarial training (Madry et al. 2018; Algorithm 1 of Free against Fast)."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F

from dist_adv.attacks import ascend
from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import Net, Stateless, Step
from dist_adv.options import MethodOptions, PositiveInt, StepSize


class PGDOptions(MethodOptions):
    """K = `steps` ascent steps of size `alpha` from a random point of the ball, or from 0."""

    name: Literal["pgd"] = "pgd"
    steps: PositiveInt = 7
    alpha: StepSize = 2 / 255
    init: Literal["random", "zero"] = "random"


class PGDTraining(Stateless):
    """Attack the batch with K steps, then take one ordinary step on what came out.

    The attack runs in train mode, as published, so BatchNorm's statistics move with it.
    """

    def __init__(self, options: PGDOptions, threat: Threat) -> None:
        self.options, self.threat = options, threat

    def steps(self, net: Net, batch: Batch) -> Iterator[Step]:
        x, y, options = batch.x, batch.y, self.options
        delta = torch.zeros_like(x)
        if options.init == "random":
            delta = self.threat.project(self.threat.random(batch.keys, x.shape), x)
        with net.frozen() as model:
            delta = ascend(model, x, y, delta, self.threat, options.steps, options.alpha)
        logits = net(x + delta)
        yield Step(F.cross_entropy(logits, y), logits)
