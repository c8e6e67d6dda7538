"""Free adversarial training (Shafahi et al. 2019; Algorithm 2 of Free against Fast)."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import CarriedDelta, Net, Step
from dist_adv.options import MethodOptions, PositiveInt


class FreeOptions(MethodOptions):
    """m = `replays` optimiser steps on every minibatch.

    `train.epochs` counts how often all images are seen and is not divided by m: 45 epochs with m
    replays are 45 m epochs' worth of updates, as in the published runs. For Algorithm 2's N / m
    epochs, write that number.
    """

    name: Literal["free"] = "free"
    replays: PositiveInt = 8


class Free:
    """m replays a minibatch; one backward gives the weights' gradient and delta's.

    After each update delta takes a step of the whole radius along its gradient. It is carried
    from minibatch to minibatch (`CarriedDelta`), so early replays start from the last images'.
    """

    def __init__(self, options: FreeOptions, threat: Threat) -> None:
        self.steps_per_batch = options.replays
        self.threat = threat
        self.carried = CarriedDelta()

    def steps(self, net: Net, batch: Batch) -> Iterator[Step]:
        delta = self.carried.read(batch.x)
        for _ in range(self.steps_per_batch):
            delta = delta.detach().requires_grad_()
            logits = net(batch.x + delta)
            yield Step(F.cross_entropy(logits, batch.y), logits)
            assert delta.grad is not None
            moved = self.threat.ascend(delta.detach(), delta.grad, self.threat.eps)
            delta = self.threat.project(moved, batch.x)
        self.carried.write(delta)

    def state_dict(self) -> dict[str, Tensor]:
        return self.carried.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.carried.load_state_dict(state)
