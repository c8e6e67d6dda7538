"""Methods that `dist_adv.testing.check_method` accepts, and methods with one mistake each."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_adv.attacks import ascend, cross_entropy, input_gradient
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
    Step,
    Task,
)


class Plain(Method[MethodOptions]):
    """FGSM from zero, which the others change."""

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        with net.frozen() as model:
            delta = self.attack(model, batch, threat, torch.zeros_like(batch.x))
        yield self.minimise(net, batch.x + delta, batch.y)

    def attack(self, model: torch.nn.Module, batch: Batch, threat: Threat, start: Tensor) -> Tensor:
        start = threat.project(start, batch.x)
        return ascend(model, batch.x, batch.y, start, threat, 1, threat.eps / 2)


class Remembers(Plain):
    """Starts between the last batch's perturbation, the image's own before, and the mean of all."""

    def __init__(self, options: MethodOptions, task: Task) -> None:
        super().__init__(options, task)
        numbers = torch.get_default_dtype()
        self.last = ByPosition()
        self.own = BySample(task.samples, task.shape, task.device, numbers)
        self.all = Everywhere(torch.zeros(task.shape, device=task.device))

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        start = self.last.read(batch.x) + self.own.read(batch.samples) + self.all.value
        with net.frozen() as model:
            delta = self.attack(model, batch, threat, start / 3)
        yield self.minimise(net, batch.x + delta, batch.y)
        self.last.write(delta)
        self.own.write(batch.samples, delta)
        self.all.value = self.mean(net, batch, delta)

    def mean(self, net: Net, batch: Batch, delta: Tensor) -> Tensor:
        return net.sum_over_ranks(delta.sum(0)) / batch.total


class MeanOfARank(Remembers):
    def mean(self, net: Net, batch: Batch, delta: Tensor) -> Tensor:
        return delta.mean(0)


class LossOfEach(Plain):
    def minimise(self, net: Net, x: Tensor, y: Tensor) -> Objective:
        def objective() -> Step:
            logits = net(x)
            return Step(cross_entropy(logits, y), logits)

        return objective


class Sum(Plain):
    def minimise(self, net: Net, x: Tensor, y: Tensor) -> Objective:
        def objective() -> Step:
            logits = net(x)
            return Step(cross_entropy(logits, y).sum(), logits)

        return objective


class OneOfTwo(Plain):
    steps_per_batch = 2


class TorchsNumbers(Plain):
    def attack(self, model: torch.nn.Module, batch: Batch, threat: Threat, start: Tensor) -> Tensor:
        return super().attack(model, batch, threat, threat.eps * torch.randn_like(start))


class Hides(Plain):
    """Keeps the last batch's perturbation where nothing saves it."""

    delta: Tensor | None = None

    def attack(self, model: torch.nn.Module, batch: Batch, threat: Threat, start: Tensor) -> Tensor:
        if self.delta is None:
            self.delta = start
        self.delta[: len(start)] = super().attack(model, batch, threat, self.delta[: len(start)])
        return self.delta[: len(start)]


class NormOfARank(Plain):
    """Divides the input gradients by the norm of all of this rank's."""

    def attack(self, model: torch.nn.Module, batch: Batch, threat: Threat, start: Tensor) -> Tensor:
        _, gradient = input_gradient(model, batch.x, start, lambda z: cross_entropy(z, batch.y))
        return threat.project(start + gradient / gradient.norm(), batch.x)


class Neighbour(Plain):
    """Carries the perturbation of another position, which on two ranks is another one."""

    def __init__(self, options: MethodOptions, task: Task) -> None:
        super().__init__(options, task)
        self.delta = ByPosition()

    def attack(self, model: torch.nn.Module, batch: Batch, threat: Threat, start: Tensor) -> Tensor:
        delta = super().attack(model, batch, threat, self.delta.read(start))
        self.delta.write(delta.roll(1, 0))
        return delta


class NotOnEveryRank(Plain):
    """Sums over ranks only where this one has more images than another."""

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        if len(batch.x) > batch.total / 2:
            net.sum_over_ranks(batch.x.sum())
        yield from super().steps(net, batch, threat)


class ThroughNet(Plain):
    """Attacks by the passes that give the weights their gradients."""

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        delta = torch.zeros_like(batch.x).requires_grad_()
        F.cross_entropy(net(batch.x + delta), batch.y).backward()
        assert delta.grad is not None
        delta = threat.project(threat.ascend(delta.detach(), delta.grad, threat.eps), batch.x)
        yield self.minimise(net, batch.x + delta, batch.y)


class Fragile(Plain):
    """Fails in the last batch of an epoch, which is a short one, in a file of torch's."""

    def attack(self, model: torch.nn.Module, batch: Batch, threat: Threat, start: Tensor) -> Tensor:
        self.y = getattr(self, "y", batch.y)
        loss = functools.partial(self.loss, self.y)
        return ascend(model, batch.x, batch.y, start, threat, 1, threat.eps, loss)

    @staticmethod
    def loss(y: Tensor, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none")


class SmallDifference(Plain):
    """Computes a slope from a difference that bf16 rounds to 0.

    Of its value alone: a gradient would amplify what summation rounds in double precision, too, to
    3e-10 of weights on a CPU with AVX512 and no AMX.
    """

    def minimise(self, net: Net, x: Tensor, y: Tensor) -> Objective:
        def objective() -> Step:
            logits = net(x)
            slopes = (net(x + 1e-4) - logits).detach().norm(dim=1) / 1e-4
            loss = self.task.loss(logits, y) + 0.1 * slopes.clamp_min(1e-3).log().mean()
            return Step(loss, logits)

        return objective
