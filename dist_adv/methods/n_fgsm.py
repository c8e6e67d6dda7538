"""N-FGSM: one step from noise around the ball, which nothing clips (de Jorge et al. 2022)."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from dist_adv.attacks import cross_entropy, input_gradient
from dist_adv.attacks.threat import Threat, to_pixels
from dist_adv.data import Batch
from dist_adv.methods.base import Guard, Method, MethodOptions, Net, Objective
from dist_adv.options import Real, StepSize


class NFGSMOptions(MethodOptions):
    """noise: the start is uniform in so many times the ball. alpha: the step (null: eps)."""

    name: str = "n-fgsm"
    noise: Annotated[Real, Field(ge=0)] = 2.0
    alpha: StepSize | None = None
    guard: Guard = "warn"


class NFGSM(Method[NFGSMOptions]):
    """d = U(-k eps, k eps); d = d + alpha sign(grad at x + d); one ordinary step at x + d.

    Only pixels are clipped: d may leave the ball, up to k eps + alpha. The noise of k = 2 is what
    keeps it from catastrophic overfitting where Fast falls into it.
    """

    title = "N-FGSM"
    about = "On adversarial images made in one step from strong noise, which may leave the ball."
    norms = ("linf",)

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, y, options = batch.x, batch.y, self.options
        alpha = threat.eps if options.alpha is None else threat.share * options.alpha
        delta = to_pixels(options.noise * threat.random(batch.keys, x.shape), x)
        with net.frozen() as model:
            _, gradient = input_gradient(model, x, delta, lambda z: cross_entropy(z, y))
        delta = to_pixels(threat.ascend(delta, gradient, alpha), x)
        yield self.minimise(net, x + delta, y)
