"""Ordinary training on clean images: the baseline without robustness."""

from collections.abc import Iterator

from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import Method, MethodOptions, Net, Objective


class NaturalOptions(MethodOptions):
    """Natural training has nothing to set."""

    name: str = "natural"


class Natural(Method[NaturalOptions]):
    """min over theta of E l(f(x), y)."""

    title = "Natural"
    about = "On the images as they are."
    soft_labels = True

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        yield self.minimise(net, batch.x, batch.y)
