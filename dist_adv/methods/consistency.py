"""One step from a start that is learnt or noise, and logits that agree at both of its ends.

Starts: `uap` and `cuap` are Pan et al. 2024, `prior` is FGSM-MEP of Jia et al. 2022; `random` and
`noise` carry nothing from batch to batch.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Annotated, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_adv import rng
from dist_adv.attacks import LOSS_SCALE
from dist_adv.attacks.threat import Threat, to_pixels
from dist_adv.data import Batch, When
from dist_adv.methods.base import Guard, Method, MethodOptions, Net, Objective, Step, Task
from dist_adv.methods.carried import BySample, Carried, Everywhere
from dist_adv.options import Real

_DECAY = 0.3  # of the momentum of gradients
_AFRESH = 40  # epochs after which a sample's start is drawn anew


ConsistentT = TypeVar("ConsistentT", bound=MethodOptions)


class ConsistencyOptions(MethodOptions):
    """strength: of the consistency.

    start: `cuap`, one perturbation a class, or `uap`, one for all; `prior`, one an image of the
    data set; `random`, uniform in the ball; `noise`, in twice the ball, which nothing clips.
    """

    name: str = "consistency"
    start: Literal["random", "noise", "uap", "cuap", "prior"] = "cuap"
    strength: Annotated[Real, Field(ge=0, title="lambda")] = 10.0
    guard: Guard = "warn"


class Consistent(Method[ConsistentT], Generic[ConsistentT]):
    """min CE(f(x + d'), y) + lambda C(f(x + d), f(x + d')), d' = clip(d + eps sign(grad)).

    The gradient, of the same loss at the start d, is taken through the forward pass that the
    second term differentiates again: seven passes and not eight.
    """

    needs = frozenset({"kept graph"})
    norms = ("linf",)
    start: "Start"

    @abstractmethod
    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        """Return C of logits (n, classes) at both ends of the step, a mean over samples."""

    @abstractmethod
    def strength(self, when: When) -> float:
        """Return lambda of a batch."""

    def target(self, batch: Batch, end: Literal["before", "after"]) -> Tensor:
        """Return what the loss there goes by: labels (n,), or probabilities (n, classes)."""
        return batch.y

    def carried(self) -> dict[str, Carried]:
        return {name: each for name, each in vars(self.start).items() if isinstance(each, Carried)}

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, n = batch.x, len(batch.x)
        start = self.start.begin(net, batch, threat).requires_grad_()
        ascent: list[Tensor] = []  # taken once, where AWP asks for the objective twice

        def objective() -> Step:
            before = net(x + start)
            if not ascent:
                total = LOSS_SCALE * n * self.task.loss(before, self.target(batch, "before"))
                ascent.extend(torch.autograd.grad(total, start, retain_graph=True))
            after = net(x + self.start.step(start.detach(), ascent[0], batch, threat))
            apart = self.distance(before, after)
            loss = self.task.loss(after, self.target(batch, "after"))
            loss = loss + self.strength(batch.when) * apart
            return Step(loss, after, {"apart": apart.detach()})

        yield objective
        self.start.learn(net, batch, torch.nan_to_num(ascent[0]))


class Consistency(Consistent[ConsistencyOptions]):
    """`Consistent` by C = mean (f(x + d) - f(x + d'))^2 of the logits."""

    title = "Consistency"
    about = (
        "On adversarial images made in one step from a start that is learnt or noise, and on "
        "logits that agree at both ends of the step."
    )

    def __init__(self, options: ConsistencyOptions, task: Task) -> None:
        super().__init__(options, task)
        self.start = _STARTS[options.start](task)

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        return F.mse_loss(after, before)

    def strength(self, when: When) -> float:
        return self.options.strength


class Start:
    """Where a step begins. This one: uniform in the ball, and nothing is learnt."""

    def __init__(self, task: Task) -> None:
        pass

    def begin(self, net: Net, batch: Batch, threat: Threat) -> Tensor:
        """Return a perturbation of the shape of batch.x, x + d in [0, 1]. Every rank calls this."""
        return to_pixels(threat.random(batch.keys, batch.x.shape), batch.x)

    def step(self, start: Tensor, gradient: Tensor, batch: Batch, threat: Threat) -> Tensor:
        """Return where the step ends, x + d in [0, 1]."""
        return threat.project(threat.ascend(start, gradient, threat.eps), batch.x)

    def learn(self, net: Net, batch: Batch, gradient: Tensor) -> None:
        """Learn from the gradient there, (n, C, H, W), which is finite. Every rank calls this."""


class _Noise(Start):
    """As N-FGSM has it: in twice the ball, and only pixels are clipped."""

    def begin(self, net: Net, batch: Batch, threat: Threat) -> Tensor:
        return to_pixels(2 * threat.random(batch.keys, batch.x.shape), batch.x)

    def step(self, start: Tensor, gradient: Tensor, batch: Batch, threat: Threat) -> Tensor:
        return to_pixels(threat.ascend(start, gradient, threat.eps), batch.x)


class _Universal(Start):
    """A perturbation a class, of -eps, 0 and eps, moved by the sign of a momentum of gradients.

    u_c = clip(u_c + sign(m_c)), m_c = mean over the class of g / |g|_1 + 0.3 m_c, where |g|_1 is
    of the whole global batch. As published, but that sizes beyond eps, which the ball clips, are
    not kept: up to 10/255, the size there, it makes no difference.
    """

    per_class = True

    def __init__(self, task: Task) -> None:
        shape = (task.classes if self.per_class else 1, *task.shape)
        self.signs = Everywhere(torch.zeros(shape, device=task.device))
        self.momentum = Everywhere(torch.zeros(shape, device=task.device))

    def begin(self, net: Net, batch: Batch, threat: Threat) -> Tensor:
        signs, when = self.signs.value, batch.when
        if when.epoch == when.batch == 0:
            key = torch.tensor([when.key], device=signs.device)
            signs.copy_(_signs(rng.substream(key, "universal"), signs.shape)[0])
        return to_pixels(threat.eps * signs[self._rows(batch)], batch.x)

    def learn(self, net: Net, batch: Batch, gradient: Tensor) -> None:
        signs, momentum = self.signs.value, self.momentum.value
        members = F.one_hot(self._rows(batch), len(signs)).T.to(gradient.dtype)  # (classes, n)
        sums = members @ gradient.flatten(1)
        sizes, norm = members.sum(1), gradient.abs().sum()
        told = net.sum_over_ranks(torch.cat([sums.flatten(), sizes, norm[None]]))
        sums, sizes, norm = told.split([sums.numel(), len(signs), 1])
        means = sums.view_as(signs) / (_to_rows(sizes.clamp_min(1), signs) * norm)
        # Without any gradient, and with one that is too large to add up, there is nothing to learn.
        present = _to_rows(sizes > 0, signs) & (norm > 0) & norm.isfinite()
        momentum.copy_(torch.where(present, means + _DECAY * momentum, momentum))
        signs.add_(present * momentum.sign()).clamp_(-1, 1)

    def _rows(self, batch: Batch) -> Tensor:
        return batch.y if self.per_class else torch.zeros_like(batch.y)


class _UniversalForAll(_Universal):
    per_class = False


class _Prior(Start):
    """A perturbation an image, of -eps, 0 and eps, from where it was left an epoch ago.

    d_i = clip(d_i + sign(m_i)), m_i = g_i / mean |g_i| + 0.3 m_i; both drawn anew every 40 epochs.
    The step is from d_i itself, which no pixel has clipped. d_i stays where it is in the crop, as
    published, which is another part of the image each time.
    The published code divides by a norm of the whole batch, and clips what it keeps to the pixels
    of a crop that is gone then.
    """

    def __init__(self, task: Task) -> None:
        self.signs = BySample(task.samples, task.shape, task.device, torch.int8)
        self.momentum = BySample(task.samples, task.shape, task.device, torch.float16)

    def begin(self, net: Net, batch: Batch, threat: Threat) -> Tensor:
        return to_pixels(threat.eps * self._read(batch), batch.x)

    def step(self, start: Tensor, gradient: Tensor, batch: Batch, threat: Threat) -> Tensor:
        return super().step(threat.eps * self._read(batch), gradient, batch, threat)

    def learn(self, net: Net, batch: Batch, gradient: Tensor) -> None:
        size = gradient.abs().flatten(1).mean(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        momentum = gradient / _to_rows(size, gradient)
        if batch.when.epoch % _AFRESH:
            momentum += _DECAY * self.momentum.read(batch.samples)
        self.signs.write(batch.samples, (self._read(batch) + momentum.sign()).clamp(-1, 1))
        self.momentum.write(batch.samples, momentum)

    def _read(self, batch: Batch) -> Tensor:
        if batch.when.epoch % _AFRESH == 0:
            return _signs(batch.keys, batch.x.shape[1:]).to(batch.x)
        return self.signs.read(batch.samples).to(batch.x)


_STARTS: dict[str, Callable[[Task], Start]] = {
    "random": Start,
    "noise": _Noise,
    "uap": _UniversalForAll,
    "cuap": _Universal,
    "prior": _Prior,
}


def _signs(keys: Tensor, shape: torch.Size) -> Tensor:
    """Return -1 or 1, (n, *shape), as likely."""
    return 2 * rng.uniform(keys, tuple(shape)).round() - 1


def _to_rows(values: Tensor, like: Tensor) -> Tensor:
    """Return a value a row, (n,), in as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
