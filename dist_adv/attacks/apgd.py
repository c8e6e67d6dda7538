"""Auto-PGD (Croce and Hein 2020, algorithm 1): ascent that halves its step where it stalls."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dist_adv import rng
from dist_adv.attacks.pgd import correct, cross_entropy, input_gradient
from dist_adv.attacks.search import Found, Rows
from dist_adv.attacks.threat import Threat, per_sample

_MOMENTUM = 0.75
"""The weight of the new step; the rest is that of the last one."""
_RISES = 0.75
"""The share of a period's steps that must raise the loss for the step size to stay."""

TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""logits (n, classes), labels (n,), targets (n,) to a loss a sample (n,)."""


def untargeted(logits: Tensor, y: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, (n,)."""
    return cross_entropy(logits, y)


def dlr_targeted(logits: Tensor, y: Tensor, targets: Tensor) -> Tensor:
    """Difference of logits ratio towards a class (Croce and Hein 2020, eq. 7); needs four classes.

    (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), (n,).
    """
    top = logits.topk(4, dim=1).values
    towards = logits.gather(1, targets[:, None]) - logits.gather(1, y[:, None])
    return towards.squeeze(1) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def _loss(of: TargetedLoss, y: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
    return of(logits, y, targets)


@dataclass
class _Ascent(Rows):
    """The images that still resist, with what is known of each. number: its place in the batch.

    before: the perturbation one step ago. best: the one of the largest loss so far. rises: how
    many steps of this period raised the loss. loss_then, halved: `best_loss` at the end of the
    last period, and whether the step was halved there.
    """

    number: Tensor
    x: Tensor
    y: Tensor
    targets: Tensor
    delta: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step_size: Tensor
    rises: Tensor
    loss_then: Tensor
    halved: Tensor

    def look(self, loss: Tensor) -> None:
        """Take note of the loss (n,) at `delta`."""
        self.rises += loss > self.loss
        self.loss = loss
        better = loss > self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        better = per_sample(better, self.x)
        self.best = torch.where(better, self.delta, self.best)
        self.best_gradient = torch.where(better, self.gradient, self.best_gradient)

    def end_period(self, steps: int) -> None:
        """Halve the step, and go back to the best, where few of the steps raised the loss.

        Or none raised the best loss since the last period, whose step was not halved.
        """
        stalled = ~self.halved & (self.loss_then >= self.best_loss)
        self.halved = (self.rises <= _RISES * steps) | stalled
        self.loss_then = self.best_loss
        self.rises = torch.zeros_like(self.rises)
        halved = per_sample(self.halved, self.x)
        self.step_size = torch.where(halved, self.step_size / 2, self.step_size)
        self.delta = torch.where(halved, self.best, self.delta)
        self.gradient = torch.where(halved, self.best_gradient, self.gradient)

    def move(self, threat: Threat, momentum: float) -> None:
        """z = P(delta + step), delta <- P(delta + a (z - delta) + (1 - a) (delta - before))."""
        direction = threat.ascend(torch.zeros_like(self.x), self.gradient, 1.0)
        step = threat.project(self.delta + self.step_size * direction, self.x) - self.delta
        moved = self.delta + momentum * step + (1 - momentum) * (self.delta - self.before)
        self.before, self.delta = self.delta, threat.project(moved, self.x)


@dataclass(frozen=True)
class APGD:
    """One run from a random point of the ball's surface. An image that falls costs no more."""

    threat: Threat
    loss: TargetedLoss
    steps: int = 100

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, targets: Tensor, keys: Tensor
    ) -> Found:
        """As of `Search`."""
        found = Found.nothing(x)
        now, periods = self._begin(x, y, targets, keys), self._periods()
        for step in range(self.steps + 1):
            logits, now.gradient = input_gradient(
                model, now.x, now.delta, partial(_loss, self.loss, now.y, now.targets)
            )
            if step == 0:
                found.attacked = len(x)
                found.zero_gradients = int((now.gradient.flatten(1) == 0).all(1).sum())
            right = correct(logits, now.y)
            if not right.all():
                found.take(now.number[~right], (now.x + now.delta)[~right])
                now, logits = now.only(right), logits[right]
                if len(now.number) == 0:
                    break
            now.look(self.loss(logits, now.y, now.targets))
            if step == 0:
                # The first period counts from a loss of 0, as in the authors' code
                # (check_oscillation reads a row that is not written yet), not from the start's.
                now.rises, now.loss = torch.zeros_like(now.rises), torch.zeros_like(now.loss)
                now.loss_then = now.best_loss
            if step in periods:
                now.end_period(periods[step])
            now.move(self.threat, 1.0 if step == 0 else _MOMENTUM)
        return found

    def _begin(self, x: Tensor, y: Tensor, targets: Tensor, keys: Tensor) -> _Ascent:
        delta, zeros = self._start(x, keys), x.new_zeros(len(x))
        never = torch.full_like(zeros, -torch.inf)
        return _Ascent(
            number=torch.arange(len(x), device=x.device),
            x=x,
            y=y,
            targets=targets,
            delta=delta,
            before=delta,
            gradient=delta,
            loss=zeros,
            best=delta,
            best_gradient=delta,
            best_loss=never,
            step_size=torch.full_like(per_sample(zeros, x), 2 * self.threat.eps),
            rises=torch.zeros_like(y),
            loss_then=zeros,
            halved=torch.ones_like(y, dtype=torch.bool),
        )

    def _start(self, x: Tensor, keys: Tensor) -> Tensor:
        shape = tuple(x.shape[1:])
        if self.threat.norm == "linf":
            noise = rng.uniform(keys, shape).mul_(2).sub_(1)
        else:
            noise = rng.normal(keys, shape)
        noise = noise.to(x)
        return self.threat.project(noise * (self.threat.eps / self.threat.size(noise)), x)

    def _periods(self) -> dict[int, int]:
        """Return the lengths of the periods by the step that ends each: 22 of 100, 3 less, ..."""
        least, less = (max(1, int(share * self.steps)) for share in (0.06, 0.03))
        length = max(1, int(0.22 * self.steps))
        ends, end = {}, length
        while end <= self.steps:
            ends[end] = length
            length = max(least, length - less)
            end += length
        return ends
