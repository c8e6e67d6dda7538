"""GAT: one step guided by how far the answer moves from the clean one (Sriramanan et al. 2020)."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Generic, TypeVar

from pydantic import Field
from torch import Tensor

from dist_adv import rng
from dist_adv.attacks import cross_entropy, input_gradient
from dist_adv.attacks.threat import Threat, to_pixels
from dist_adv.data import Batch, When
from dist_adv.methods.base import Guard, Method, MethodOptions, Net, Objective, Step
from dist_adv.options import Real

GuidedT = TypeVar("GuidedT", bound=MethodOptions)


class Guided(Method[GuidedT], Generic[GuidedT]):
    """min CE(z, y) + lambda D(z, z'), z = f(x), z' = f(x + d'), and d' = clip(d + eps sign(grad)).

    The step starts at d = -eps/2 or eps/2 a pixel and ascends CE(z', y) + lambda b D(z, z'), in
    eval mode, at constant z; b is 1 in every other batch of an epoch, beginning with the second,
    and else 0. The published loops pass x twice in train mode where this one does once, so their
    BatchNorm statistics move once more a step.
    """

    norms = ("linf",)
    soft_labels = True

    @abstractmethod
    def distance(self, net: Net, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Return D a sample, (n,), of logits (n, classes)."""

    @abstractmethod
    def strength(self, when: When) -> float:
        """Return lambda of a batch."""

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        x, y, strength = batch.x, batch.y, self.strength(batch.when)
        found: list[Tensor] = []  # made once, where AWP asks for the objective twice

        def objective() -> Step:
            logits = net(x)
            if not found:
                found.append(self._attack(net, batch, threat, logits.detach(), strength))
            adversarial = net(x + found[0])
            natural = self.task.loss(logits, y)
            apart = self.distance(net, logits, adversarial).mean()
            scalars = {"natural_loss": natural.detach(), "apart": apart.detach()}
            return Step(natural + strength * apart, adversarial, scalars)

        yield objective

    def _attack(
        self, net: Net, batch: Batch, threat: Threat, clean: Tensor, strength: float
    ) -> Tensor:
        x, y = batch.x, batch.y
        guide = strength * (batch.when.batch % 2)

        def loss(logits: Tensor) -> Tensor:
            wrong = cross_entropy(logits, y)
            return wrong + guide * self.distance(net, clean, logits) if guide else wrong

        corners = rng.uniform(batch.keys, tuple(x.shape[1:])).to(x) - 0.5
        start = to_pixels(threat.eps / 2 * corners.sign(), x)
        with net.frozen("eval") as model:
            _, gradient = input_gradient(model, x, start, loss)
        return threat.project(threat.ascend(start, gradient, threat.eps), x)


class GATOptions(MethodOptions):
    """strength: four times this in the last 14 % of the run, as published."""

    name: str = "gat"
    strength: Annotated[Real, Field(ge=0, title="lambda")] = 10.0
    guard: Guard = "warn"


class GAT(Guided[GATOptions]):
    """`Guided` by D = sum_k (P_k - Q_k)^2 of the probabilities P of x and Q of x + d'."""

    title = "GAT"
    about = (
        "On clean images, and on probabilities near theirs for adversarial images, made in one "
        "step that in every other batch is guided by that distance."
    )

    def distance(self, net: Net, clean: Tensor, adversarial: Tensor) -> Tensor:
        return (clean.softmax(1) - adversarial.softmax(1)).square().sum(1)

    def strength(self, when: When) -> float:
        return (4 if when.progress >= 0.86 else 1) * self.options.strength
