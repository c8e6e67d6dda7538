"""A method that nobody published, which carries something of each kind, and a small network."""

from collections.abc import Iterator

import torch
from torch import nn

from dist_adv import rng
from dist_adv.attacks import cross_entropy, input_gradient
from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods import (
    ByPosition,
    BySample,
    Everywhere,
    Method,
    MethodOptions,
    Net,
    Objective,
    Task,
)
from dist_adv.models import ModelOptions


class Tiny(nn.Module):
    """Two layers with BatchNorm between them: what there is to compile is soon compiled."""

    class Options(ModelOptions):
        width: int = 8

    def __init__(self, options: Options, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, options.width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(options.width)
        self.last = nn.Linear(options.width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu().mean((2, 3)))


class CarryingOptions(MethodOptions):
    alpha: float = 0.05


class Carrying(Method[CarryingOptions]):
    """One step from what the position, the sample and the whole data set had before.

    The start grows with the run, and a random image of the batch is added.
    """

    def __init__(self, options: CarryingOptions, task: Task) -> None:
        super().__init__(options, task)
        kind = torch.get_default_dtype()
        self.last = ByPosition()
        self.table = BySample(task.samples, task.shape, task.device, kind)
        self.image = Everywhere(torch.zeros(task.shape, device=task.device, dtype=kind))

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, y, when = batch.x, batch.y, batch.when
        noise = rng.uniform(torch.tensor([when.key], device=x.device), tuple(x.shape[1:])).to(x)
        before = self.last.read(x) + self.table.read(batch.samples) + self.image.value
        start = threat.project((0.3 + when.progress) * before + 0.01 * noise, x)
        with net.frozen() as model:
            _, gradient = input_gradient(model, x, start, lambda z: cross_entropy(z, y))
        delta = threat.project(threat.ascend(start, gradient, self.options.alpha), x)
        self.last.write(delta)
        self.table.write(batch.samples, 0.5 * delta)
        total = net.sum_over_ranks(gradient.sum(0))
        self.image.value.add_(0.01 * total.sign())
        yield self.minimise(net, x + delta, y)
