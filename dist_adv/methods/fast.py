"""Fast adversarial training: one FGSM step from a random start (Wong, Rice and Kolter 2020)."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_adv.attacks import ascend
from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import CarriedDelta, Net, Step
from dist_adv.options import Guard, MethodOptions, StepSize


class FastOptions(MethodOptions):
    """`alpha` of 1.25 eps is the paper's; 2 eps collapses (catastrophic overfitting).

    init: `random` in the ball; `zero`; `previous`, the last batch's perturbation.
    """

    name: Literal["fast"] = "fast"
    alpha: StepSize = 10 / 255
    init: Literal["random", "zero", "previous"] = "random"
    guard: Guard = "warn"


class Fast:
    """delta = start; delta = clip(delta + alpha sign(grad)); one ordinary step at x + delta."""

    steps_per_batch = 1

    def __init__(self, options: FastOptions, threat: Threat) -> None:
        self.options, self.threat = options, threat
        self.previous = CarriedDelta()

    def steps(self, net: Net, batch: Batch) -> Iterator[Step]:
        x, y = batch.x, batch.y
        delta = self._start(batch)
        with net.frozen() as model:
            delta = ascend(model, x, y, delta, self.threat, 1, self.options.alpha)
        if self.options.init == "previous":
            self.previous.write(delta)
        logits = net(x + delta)
        yield Step(F.cross_entropy(logits, y), logits)

    def _start(self, batch: Batch) -> Tensor:
        if self.options.init == "random":
            delta = self.threat.random(batch.keys, batch.x.shape)
            return self.threat.project(delta, batch.x)
        if self.options.init == "previous":
            return self.previous.read(batch.x)
        return torch.zeros_like(batch.x)

    def state_dict(self) -> dict[str, Tensor]:
        return self.previous.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.previous.load_state_dict(state)
