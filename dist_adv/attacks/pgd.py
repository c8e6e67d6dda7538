"""Projected gradient ascent (Madry et al. 2018); FGSM is one step of it from zero.

An attack differentiates with respect to the input only: the parameters are frozen meanwhile, so
no weight gradient is computed and DDP has nothing to communicate.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_adv import rng
from dist_adv.attacks.threat import Projection, Threat

Loss = Literal["ce", "margin", "dlr"]

# Gradients are those of 512 times the sum of the losses. Only their direction counts. A sum, so
# that a sample's gradient does not depend on how many share the batch: the same at any number of
# ranks and after compaction. 512, which is exact in fp32 and bf16 and in fp16 keeps small input
# gradients from underflowing: GradScaler's first 65536 times the mean over a batch of 128.
LOSS_SCALE = 512.0


@contextmanager
def frozen(model: nn.Module, eval_mode: bool = False) -> Iterator[nn.Module]:
    """Yield the model with the gradients of its parameters off, and restore them in the end.

    eval_mode: meanwhile all its layers are in eval mode, in which BatchNorm uses its running
    statistics and moves none; otherwise each stays in the mode that it has.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    switched = [module for module in model.modules() if eval_mode and module.training]
    for parameter in wanted:
        parameter.requires_grad_(False)
    for module in switched:
        module.training = False
    try:
        yield model
    finally:
        for module in switched:
            module.training = True
        for parameter in wanted:
            parameter.requires_grad_(True)


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """bool (n,): the answer is right. NaN is no answer, though argmax would call it one."""
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    """Logits with the true class's at -inf."""
    return logits.scatter(1, y[:, None], -torch.inf)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest other logit minus the true one (Carlini and Wagner 2017); above 0 when fooled."""
    return _others(logits, y).amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def _dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, eq. 6): the margin, free of scale.

    Needs three classes; with two, the margin over itself would be constant.
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return a loss a sample, (n,). y: labels (n,), or probabilities (n, classes)."""
    return F.cross_entropy(logits, y, reduction="none")


_LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": _dlr,
}


def _loss(of: Callable[[Tensor, Tensor], Tensor], y: Tensor, logits: Tensor) -> Tensor:
    return of(logits, y)


def input_gradient(
    model: nn.Module, x: Tensor, delta: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Differentiate a loss with respect to a perturbation.

    Args:
        model: frozen (`frozen`, or a method's `net.frozen`), in whatever mode and precision.
        x: images (n, C, H, W) in [0, 1].
        delta: where the gradient is taken, of the shape of x.
        loss: logits (n, classes) to a loss a sample (n,).

    Returns:
        Logits at x + delta, and the gradient of 512 times the sum of the losses (see
        `LOSS_SCALE`), of the shape of x.
    """
    delta = delta.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x + delta)
        losses = loss(logits)
    scale = torch.full_like(losses, LOSS_SCALE)
    return logits.detach(), torch.autograd.grad(losses, delta, scale)[0]


def ascend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    threat: Threat,
    steps: int,
    step_size: float,
    loss: Callable[[Tensor], Tensor] | None = None,
    project: Projection | None = None,
) -> Tensor:
    """Attack for training: ascend and project `steps` times, on the model as it is.

    Every sample takes every step: delta <- project(delta + step_size * direction of the gradient).

    Args:
        model: frozen, in whatever mode (train, as in the papers) and precision it is in.
        x: images (n, C, H, W) in [0, 1]; y: their labels (n,), or probabilities (n, classes).
        delta: where the ascent starts, of the shape of x.
        threat: the ball.
        steps: how many gradients are taken.
        step_size: in pixel units, of the full ball: shrinks with it while it is warmed up.
        loss: logits (n, classes) to a loss a sample (n,), where it is not their cross-entropy.
        project: `threat.around(x)`, where the caller has used it already.

    Returns:
        delta in the ball, x + delta in [0, 1].
    """
    objective = loss or partial(_loss, cross_entropy, y)
    project = project or threat.around(x)
    for _ in range(steps):
        _, gradient = input_gradient(model, x, delta, objective)
        delta = project(threat.ascend(delta, gradient, threat.share * step_size))
    return delta


@dataclass(frozen=True)
class Outcome:
    """What an attack did to each of n samples.

    fell_at: int64 (n,), after how many steps the sample was first misclassified (0: at a starting
    point), -1 if it was wrong without any perturbation, `steps` + 1 if it never fell.
    fell_in: int64 (n,), in which restart (0 is the first).
    delta: (n, C, H, W), what fooled it, else the last perturbation tried.
    attacked, zero_gradients: how many samples took a first step, and how many of them had an
    input gradient of exactly 0 there.
    """

    fell_at: Tensor
    fell_in: Tensor
    delta: Tensor
    attacked: int
    zero_gradients: int

    def survives(self, steps: int, restarts: int) -> Tensor:
        """bool (n,): what a run of fewer steps or restarts from the same starts would leave.

        Exact for one restart of any length, and for any number of restarts of full length.
        """
        return (self.fell_at > steps) | (self.fell_in >= restarts)


@dataclass(frozen=True)
class PGD:
    """The attack behind reported numbers: the worst case a sample over restarts and iterates.

    A sample is done once any iterate fools the model, and then costs nothing more: the rest
    are compacted before the next step. `step_size` is in pixel units.
    """

    steps: int
    step_size: float
    restarts: int = 1
    init: Literal["random", "zero"] = "random"
    loss: Loss = "ce"

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, keys: Tensor
    ) -> Outcome:
        """Attack x (n, C, H, W) in [0, 1] with labels y (n,); keys (n,) make the random starts.

        The model is used as it is: put it in eval mode and fp32 first.
        """
        with frozen(model):
            return self._attack(model, x, y, threat, keys)

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, keys: Tensor
    ) -> Outcome:
        never = self.steps + 1
        with torch.no_grad():
            fell_at = torch.where(correct(model(x), y), never, -1)
        fell_in = torch.zeros_like(fell_at)
        worst = torch.zeros_like(x)
        attacked = zero_gradients = 0
        for restart in range(self.restarts):
            active = (fell_at == never).nonzero().squeeze(1)
            delta = torch.zeros_like(x[active])
            if self.init == "random":
                starts = rng.substream(keys[active], f"restart {restart}")
                delta = threat.project(threat.random(starts, delta.shape), x[active])
            for step in range(self.steps + 1):
                if len(active) == 0:
                    break
                if step < self.steps:
                    loss = partial(_loss, _LOSSES[self.loss], y[active])
                    logits, gradient = input_gradient(model, x[active], delta, loss)
                else:  # where the last step led
                    with torch.no_grad():
                        logits, gradient = model(x[active] + delta), delta
                if restart == step == 0:
                    attacked = len(active)
                    zero_gradients = int((gradient.flatten(1) == 0).all(1).sum())
                worst[active] = delta
                right = correct(logits, y[active])
                fell_at[active[~right]], fell_in[active[~right]] = step, restart
                active, delta, gradient = active[right], delta[right], gradient[right]
                if step < self.steps:
                    moved = threat.ascend(delta, gradient, self.step_size)
                    delta = threat.project(moved, x[active])
        return Outcome(fell_at, fell_in, worst, attacked, zero_gradients)
