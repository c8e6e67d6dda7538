"""LIET: one step from what the network expects of a label alone, half hidden (Pan et al. 2025)."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_adv import rng
from dist_adv.attacks import input_gradient
from dist_adv.attacks.threat import Threat, to_pixels
from dist_adv.data import Batch, When
from dist_adv.errors import UserError
from dist_adv.methods.base import Guard, MethodOptions, Net, Task
from dist_adv.methods.carried import Everywhere
from dist_adv.methods.consistency import Consistent, Start
from dist_adv.options import TUPLE, PositiveInt, Real, Share


class LIETOptions(MethodOptions):
    """strength: lambda at the end, to which it rises from 0 in proportion to the steps done.

    smoothing: the share of a label that is spread over the other classes, at random and anew each
    time it is asked for. refresh: batches after which the examples are made anew, counted from
    each epoch's first. hidden: between which shares of an example are noise. noise: in eps; above 1
    only pixels are clipped, and no ball (published with 2 for eps 12/255 and 16/255).
    """

    name: str = "liet"
    strength: Annotated[Real, Field(ge=0, title="lambda")] = 100.0
    smoothing: Annotated[Real, Field(ge=0, lt=1)] = 0.6
    refresh: PositiveInt = 10
    hidden: Annotated[tuple[Share, Share], TUPLE] = (0.1, 0.5)
    noise: Annotated[Real, Field(gt=0)] = 1.0
    guard: Guard = "warn"


class LIET(Consistent[LIETOptions]):
    """`Consistent` by C = JS(P, Q), the divergence of the probabilities of x + d and x + d'.

    d = s (m e_y + (1 - m) u): e_c = eps sign(grad CE(f(1/2 + e), c)) at e = 0, f in eval mode; a
    pixel is hidden (m = 0) with probability r; u is uniform in the ball; r and s = -1 or 1 are the
    batch's. Its draws are of the global batch, and gradients of ranks, whose running statistics
    are their own, are summed for e; published is one process. lambda rises by epochs there.
    """

    title = "LIET"
    about = (
        "On adversarial images made in one step from noise and from what the network expects of a "
        "label alone, and on probabilities that agree at both ends of the step."
    )

    def __init__(self, options: LIETOptions, task: Task) -> None:
        super().__init__(options, task)
        even = 1 - 1 / task.classes
        if options.smoothing >= even:
            raise UserError(
                f"method.smoothing: {options.smoothing:g} of a label leaves it no more than an "
                f"even split over {task.classes} classes does; use less than {even:.3g}"
            )
        self.start = _Examples(options, task)

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        logs = torch.stack([before.log_softmax(1), after.log_softmax(1)])
        middle = logs.logsumexp(0) - math.log(2)
        return 0.5 * (logs.exp() * (logs - middle)).sum() / len(before)

    def strength(self, when: When) -> float:
        return when.progress * self.options.strength

    def target(self, batch: Batch, end: Literal["before", "after"]) -> Tensor:
        keys = rng.substream(batch.keys, f"label {end}")
        one = F.one_hot(batch.y, self.task.classes).to(batch.x)
        return _smoothed(one, keys, self.options.smoothing)


class _Examples(Start):
    def __init__(self, options: LIETOptions, task: Task) -> None:
        self.options = options
        shape = (task.classes, *task.shape)
        self.signs = Everywhere(torch.zeros(shape, device=task.device))
        self.made_for: int | None = None

    def begin(self, net: Net, batch: Batch, threat: Threat) -> Tensor:
        x, when = batch.x, batch.when
        # Once a batch, also of one in parts, of which ranks may have more and fewer.
        if when.batch % self.options.refresh == 0 and when.key != self.made_for:
            self.signs.value.copy_(self._expected(net, when))
            self.made_for = when.key
        low, high = self.options.hidden
        key = rng.substream(torch.full((1,), when.key, device=x.device), "example")
        of_batch = rng.uniform(key, (2,))[0].to(x)
        hidden = rng.uniform(rng.substream(batch.keys, "hidden"), tuple(x.shape[1:])).to(x)
        hidden = hidden < low + (high - low) * of_batch[0]
        noise = self.options.noise * threat.random(batch.keys, x.shape).to(x)
        delta = torch.where(hidden, noise, threat.eps * self.signs.value[batch.y].to(x))
        return to_pixels(torch.where(of_batch[1] < 0.5, -delta, delta), x)

    def step(self, start: Tensor, gradient: Tensor, batch: Batch, threat: Threat) -> Tensor:
        if self.options.noise > 1:
            return to_pixels(threat.ascend(start, gradient, threat.eps), batch.x)
        return super().step(start, gradient, batch, threat)

    def _expected(self, net: Net, when: When) -> Tensor:
        """Return the signs of e, (classes, C, H, W)."""
        grey = torch.full_like(self.signs.value, 0.5)
        labels = torch.arange(len(grey), device=grey.device)
        keys = rng.substream(rng.sample_keys(when.key, labels), "label")
        target = _smoothed(F.one_hot(labels, len(grey)).to(grey), keys, self.options.smoothing)

        def loss(logits: Tensor) -> Tensor:
            return -(target * logits.log_softmax(1)).sum(1)

        with net.frozen("eval") as model:
            _, gradient = input_gradient(model, grey, torch.zeros_like(grey), loss)
        return net.sum_over_ranks(torch.nan_to_num(gradient)).sign()


def _smoothed(one: Tensor, keys: Tensor, share: float) -> Tensor:
    """Return probabilities (n, classes): 1 - share where one is 1, a random split of the rest."""
    others = rng.uniform(keys, (one.shape[1],)).to(one) * (1 - one)
    total = others.sum(1, keepdim=True).clamp_min(torch.finfo(one.dtype).tiny)
    return (1 - share) * one + share * others / total
