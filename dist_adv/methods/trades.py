"""TRADES: accuracy on clean images against agreement with their adversarial neighbours.

Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", 2019.
"""

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

_TINY = torch.finfo(torch.float32).tiny
_START = 1e-3  # standard deviation of the noise from which the attack starts


class TRADESOptions(MethodOptions):
    """beta: the weight of agreement, 1 / lambda in the paper. K = `steps` of size `alpha`."""

    name: str = "trades"
    beta: Annotated[Real, Field(ge=0)] = 6.0
    steps: Annotated[PositiveInt, Field(title="K")] = 10
    alpha: StepSize = 2 / 255


class TRADES(Method[TRADESOptions]):
    """min CE(f(x), y) + beta KL(f(x) || f(x')), where x' in the ball has the largest KL.

    The attack runs in eval mode, as published. The published loop passes x twice in train mode
    where this one does once, so its BatchNorm statistics move once more a step.
    """

    title = "TRADES"
    about = (
        "On clean images, and on agreement between these and adversarial images, which are made "
        "in K steps to disagree most."
    )
    soft_labels = True

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, y, options = batch.x, batch.y, self.options
        delta = to_pixels(_START * rng.normal(batch.keys, tuple(x.shape[1:])).to(x), x)
        with net.frozen("eval") as model:
            with torch.no_grad():
                clean = model(x).softmax(1)
            delta = ascend(
                model, x, y, delta, threat, options.steps, options.alpha, lambda z: _kl(clean, z)
            )

        def objective() -> Step:
            logits, adversarial = net(x), net(x + delta)
            natural = self.task.loss(logits, y)
            # 0 log 0 is 0, but its gradient is NaN: of logits 104 apart fp32 makes a probability 0.
            robust = _kl(logits.softmax(1).clamp_min(_TINY), adversarial).mean()
            loss = natural + options.beta * robust
            scalars = {"natural_loss": natural.detach(), "kl": robust.detach()}
            return Step(loss, adversarial, scalars)

        yield objective


def _kl(clean: Tensor, logits: Tensor) -> Tensor:
    """KL(clean || softmax(logits)) a sample, (n,); both (n, classes)."""
    return F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)
