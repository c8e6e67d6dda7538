"""PGD adversarial training (Madry et al. 2018; Algorithm 1 of Free against Fast)."""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field

from dist_adv.attacks import ascend
from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import AttackMode, Method, MethodOptions, Net, Objective
from dist_adv.options import PositiveInt, StepSize


class PGDOptions(MethodOptions):
    """K = `steps` ascent steps of size `alpha` from a random point of the ball, or from 0.

    attack_mode: of the network in the attack; `eval` takes BatchNorm's running statistics and
    drops no layers, as the recipes for ImageNet do.
    """

    name: str = "pgd"
    steps: Annotated[PositiveInt, Field(title="K")] = 7
    alpha: StepSize = 2 / 255
    init: Literal["random", "zero"] = "random"
    attack_mode: AttackMode = "train"


class PGDTraining(Method[PGDOptions]):
    """Attack the batch with K steps, then take one ordinary step on what came out.

    As published the attack runs in train mode, so BatchNorm's statistics move with it.
    """

    title = "PGD"
    about = "On adversarial images, made anew for each batch in K steps."
    soft_labels = True

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, y, options = batch.x, batch.y, self.options
        project, steps, alpha = threat.around(x), options.steps, options.alpha
        if options.init == "random":
            delta = project(threat.random(batch.keys, x.shape))
        else:
            delta = torch.zeros_like(x)
        with net.frozen(options.attack_mode) as model:
            delta = ascend(model, x, y, delta, threat, steps, alpha, project=project)
        yield self.minimise(net, x + delta, y)
