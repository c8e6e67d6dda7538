"""ADR: targets softened by the averaged weights' own answers (Wu et al. 2024)."""

import math
from collections.abc import Iterator
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_adv.attacks import ascend
from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import Method, MethodOptions, Net, Objective
from dist_adv.options import TUPLE, PositiveInt, Real, Share, StepSize

Temperature = Annotated[Real, Field(gt=0)]


class ADROptions(MethodOptions):
    """K = `steps` of size `alpha`, as PGD training has them.

    temperature, share: of the averaged weights' answer in the target; both move from the first
    value to the second in a half cosine over the run.
    """

    name: str = "adr"
    steps: Annotated[PositiveInt, Field(title="K")] = 10
    alpha: StepSize = 2 / 255
    temperature: Annotated[tuple[Temperature, Temperature], TUPLE] = (2.5, 2.0)
    share: Annotated[tuple[Share, Share], TUPLE] = (0.7, 0.95)


class ADR(Method[ADROptions]):
    """PGD training towards r = s q + (1 - s) onehot(y), q = softmax(averaged f(x) / tau).

    s = clip(share - (max_k q_k - q_y), 0, 1): less of q where it is wrong. The attack ascends the
    same cross-entropy. The average is the run's own (`average`), of half an epoch as published.
    """

    title = "ADR"
    about = (
        "On adversarial images, made in K steps, towards targets that the averaged weights' own "
        "answers soften."
    )
    needs = frozenset({"average"})

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, options = batch.x, self.options
        target = self._target(net, batch)
        delta = threat.project(threat.random(batch.keys, x.shape), x)

        def loss(logits: Tensor) -> Tensor:
            return -(target * logits.log_softmax(1)).sum(1)

        with net.frozen() as model:
            delta = ascend(model, x, batch.y, delta, threat, options.steps, options.alpha, loss)
        yield self.minimise(net, x + delta, target)

    def _target(self, net: Net, batch: Batch) -> Tensor:
        """Return r, (n, classes)."""
        y, options, done = batch.y, self.options, batch.when.progress
        answer = (net.averaged(batch.x) / _between(*options.temperature, done)).softmax(1)
        wrong = answer.amax(1) - answer.gather(1, y[:, None]).squeeze(1)
        share = (_between(*options.share, done) - wrong).clamp(0, 1)[:, None]
        return share * answer + (1 - share) * F.one_hot(y, self.task.classes)


def _between(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))
