"""Fast adversarial training: one FGSM step from a random start (Wong, Rice and Kolter 2020)."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from dist_adv.attacks import ascend
from dist_adv.attacks.threat import Projection, Threat
from dist_adv.data import Batch
from dist_adv.methods.base import AttackMode, Guard, Method, MethodOptions, Net, Objective, Task
from dist_adv.methods.carried import ByPosition
from dist_adv.options import StepSize


class FastOptions(MethodOptions):
    """`alpha` of 1.25 eps is the paper's; 2 eps collapses (catastrophic overfitting).

    init: `random` in the ball; `zero`; `previous`, the last batch's perturbation. attack_mode: of
    the network in the attack.
    """

    name: str = "fast"
    alpha: StepSize = 10 / 255
    init: Literal["random", "zero", "previous"] = "random"
    attack_mode: AttackMode = "train"
    guard: Guard = "warn"


class Fast(Method[FastOptions]):
    """delta = start; delta = clip(delta + alpha sign(grad)); one ordinary step at x + delta."""

    title = "Fast"
    about = "On adversarial images made in one step of size alpha."
    soft_labels = True

    def __init__(self, options: FastOptions, task: Task) -> None:
        super().__init__(options, task)
        self.delta = ByPosition()

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, y = batch.x, batch.y
        project = threat.around(x)
        delta = self._start(batch, threat, project)
        with net.frozen(self.options.attack_mode) as model:
            delta = ascend(model, x, y, delta, threat, 1, self.options.alpha, project=project)
        if self.options.init == "previous":
            self.delta.write(delta)
        yield self.minimise(net, x + delta, y)

    def _start(self, batch: Batch, threat: Threat, project: Projection) -> Tensor:
        if self.options.init == "random":
            return project(threat.random(batch.keys, batch.x.shape))
        if self.options.init == "previous":
            return self.delta.read(batch.x)
        return torch.zeros_like(batch.x)
