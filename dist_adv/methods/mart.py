"""MART: agreement matters most where the network is unsure (Wang et al. 2020)."""

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_adv import rng
from dist_adv.attacks import ascend
from dist_adv.attacks.threat import Threat, to_pixels
from dist_adv.data import Batch
from dist_adv.methods.base import Method, MethodOptions, Net, Objective, Step
from dist_adv.options import PositiveInt, Real, StepSize

_START = 1e-3  # standard deviation of the noise from which the attack starts
# Published: so that a probability of 1 or 0 has a logarithm, and whoever is sure still counts.
_TINY, _SURE = 1e-12, 1.0000001
_LEAST = torch.finfo(torch.float32).tiny


class MARTOptions(MethodOptions):
    """beta: the weight of agreement, lambda in the paper. K = `steps` of size `alpha`."""

    name: str = "mart"
    beta: Annotated[Real, Field(ge=0)] = 5.0
    steps: Annotated[PositiveInt, Field(title="K")] = 10
    alpha: StepSize = 2 / 255


class MART(Method[MARTOptions]):
    """min CE(z', y) - log(1 - max_{k != y} p'_k) + beta KL(p || p') (1 - p_y).

    p and p' are the probabilities of x and of x' in the ball, whose cross-entropy is largest. The
    attack runs in eval mode, as published.
    """

    title = "MART"
    about = (
        "On adversarial images, made in K steps, with a margin; and on agreement with the clean "
        "images, the more the less sure these are."
    )

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, y, options = batch.x, batch.y, self.options
        delta = to_pixels(_START * rng.normal(batch.keys, tuple(x.shape[1:])).to(x), x)
        with net.frozen("eval") as model:
            delta = ascend(model, x, y, delta, threat, options.steps, options.alpha)

        def objective() -> Step:
            # 0 log 0 is 0, but its gradient is NaN: of logits 104 apart fp32 makes a probability 0.
            p, adversarial = net(x).softmax(1).clamp_min(_LEAST), net(x + delta)
            q = adversarial.softmax(1)
            boosted = self.task.loss(adversarial, y) + _margin(q, y).mean()
            apart = (_kl(p, q) * (_SURE - p.gather(1, y[:, None]).squeeze(1))).mean()
            loss = boosted + options.beta * apart
            return Step(loss, adversarial, {"boosted_ce": boosted.detach(), "kl": apart.detach()})

        yield objective


def _margin(q: Tensor, y: Tensor) -> Tensor:
    """-log(1 - the largest probability of another class), (n,)."""
    others = q.scatter(1, y[:, None], 0).amax(1)
    return -torch.log(1.0001 - others + _TINY)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) a sample, (n,); both (n, classes)."""
    return F.kl_div(torch.log(q + _TINY), p, reduction="none").sum(1)
