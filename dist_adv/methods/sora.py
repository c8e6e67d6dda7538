"""SORA: steps as long as the loss is straight (2026, arXiv 2606.00738; from its formulas)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_adv import rng
from dist_adv.attacks import LOSS_SCALE, input_gradient
from dist_adv.attacks.threat import Threat, to_pixels
from dist_adv.data import Batch
from dist_adv.methods.base import Guard, Method, MethodOptions, Net, Objective, Step, Task
from dist_adv.methods.carried import Everywhere

_FIRST, _DECAY = 0.99, 0.95  # of the running linearity
_LINEAR = 0.02  # below this distance from 1 the step is whole


class SORAOptions(MethodOptions):
    name: str = "sora"
    guard: Guard = "warn"


class SORA(Method[SORAOptions]):
    """d = U(-eps, eps); d' = d + 2 eps min(1, 0.02 / (1 - v)) U(0, 1) sign(g), where g is at d.

    Only pixels are clipped. v is a running mean of <sign g, h> / |g|_1, h being the gradient at
    d', which the ordinary step at x + d' gives for nothing: 1 where the loss is linear between.
    """

    title = "SORA"
    about = (
        "On adversarial images made in one step from noise, which is shorter where the loss has "
        "been found to be curved."
    )
    norms = ("linf",)
    soft_labels = True

    def __init__(self, options: SORAOptions, task: Task) -> None:
        super().__init__(options, task)
        self.linearity = Everywhere(torch.full((1,), _FIRST, device=task.device))

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, y, linearity = batch.x, batch.y, self.linearity.value
        noise = to_pixels(threat.random(batch.keys, x.shape), x)

        def loss(logits: Tensor) -> Tensor:
            return len(y) * self.task.loss(logits, y)  # the sum, of labels as smooth as below

        with net.frozen() as model:
            _, first = input_gradient(model, x, noise, loss)
        share = rng.uniform(rng.substream(batch.keys, "share"), tuple(x.shape[1:])).to(x)
        size = 2 * threat.eps * (_LINEAR / (1 - linearity).clamp_min(_LINEAR))
        moved = noise + share * threat.ascend(torch.zeros_like(x), first, 1.0) * size
        delta = to_pixels(moved, x).requires_grad_()
        scale = torch.ones((), dtype=x.dtype, device=x.device, requires_grad=True)
        losses: list[Tensor] = []

        def objective() -> Step:
            logits = net(x + delta)
            loss = self.task.loss(logits, y)
            losses.append(loss.detach())
            return Step(scale * loss, logits, {"linearity": linearity[0]})

        yield objective
        assert delta.grad is not None
        assert scale.grad is not None
        # The engine weights and scales the loss before it takes gradients: so does it this one's,
        # which is the loss itself. Of the sum over samples, as the first gradient is.
        per_loss = LOSS_SCALE * len(y) * losses[-1] / scale.grad
        self._learn(net, batch, first, delta.grad * per_loss)

    def _learn(self, net: Net, batch: Batch, first: Tensor, second: Tensor) -> None:
        first, second = first.flatten(1), second.flatten(1)
        of_each = (first.sign() * second).sum(1) / first.abs().sum(1)
        told = net.sum_over_ranks(torch.nan_to_num(of_each, 0, 0, 0).sum()) / batch.total
        value = self.linearity.value
        value.mul_(_DECAY).add_((1 - _DECAY) * told.clamp(-1, 1))
