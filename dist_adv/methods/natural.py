"""Ordinary training on clean images: the baseline without robustness."""

from collections.abc import Iterator
from typing import Literal

import torch.nn.functional as F

from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import Net, Stateless, Step
from dist_adv.options import MethodOptions


class NaturalOptions(MethodOptions):
    """Natural training has nothing to set."""

    name: Literal["natural"] = "natural"


class Natural(Stateless):
    """min over theta of E l(f(x), y)."""

    def __init__(self, options: NaturalOptions, threat: Threat) -> None:
        pass

    def steps(self, net: Net, batch: Batch) -> Iterator[Step]:
        logits = net(batch.x)
        yield Step(F.cross_entropy(logits, batch.y), logits)
