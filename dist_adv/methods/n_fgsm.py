"""N-FGSM: one step from noise around the ball, which nothing clips (de Jorge et al. 2022)."""

from collections.abc import Iterator
from typing import Annotated, Generic, TypeVar

from pydantic import Field
from torch import Tensor

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


NoiseT = TypeVar("NoiseT", bound=NFGSMOptions)


class FromNoise(Method[NoiseT], Generic[NoiseT]):
    """What takes N-FGSM's step."""

    norms = ("linf",)
    soft_labels = True

    def attack(self, net: Net, batch: Batch, threat: Threat) -> tuple[Tensor, Tensor]:
        """Return the logits at the noise, (n, classes), and the perturbation."""
        x, y, options = batch.x, batch.y, self.options
        alpha = threat.eps if options.alpha is None else threat.share * options.alpha
        noise = to_pixels(options.noise * threat.random(batch.keys, x.shape), x)
        with net.frozen() as model:
            logits, gradient = input_gradient(model, x, noise, lambda z: cross_entropy(z, y))
        return logits, to_pixels(threat.ascend(noise, gradient, alpha), x)


class NFGSM(FromNoise[NFGSMOptions]):
    """d = U(-k eps, k eps); d = d + alpha sign(grad at x + d); one ordinary step at x + d.

    Only pixels are clipped: d may leave the ball, up to k eps + alpha. The noise of k = 2 is what
    keeps it from catastrophic overfitting where Fast falls into it.
    """

    title = "N-FGSM"
    about = "On adversarial images made in one step from strong noise, which may leave the ball."

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        _, delta = self.attack(net, batch, threat)
        yield self.minimise(net, batch.x + delta, batch.y)
