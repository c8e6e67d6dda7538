"""NuAT: guided by the nuclear norm of what an attack makes of a batch (Sriramanan et al. 2021)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dist_adv.data import When
from dist_adv.methods.base import Guard, MethodOptions, Net, Task
from dist_adv.methods.gat import Guided
from dist_adv.options import Real


class NuATOptions(MethodOptions):
    """strength: lambda at the end, to which it rises from 0 in proportion to the steps done.

    4 is published for batches of 64. The norm of a batch grows as the root of its size, its mean
    a sample falls as that: at 128 the same number is weaker by a factor of 0.71.
    """

    name: str = "nuat"
    strength: Annotated[Real, Field(ge=0, title="lambda")] = 4.0
    guard: Guard = "warn"


class NuAT(Guided[NuATOptions]):
    """`Guided` by D = |Z - Z'|_* / B of the logits Z (B, classes) of the whole global batch.

    With M = Z - Z', the norm is tr((M^T M)^(1/2)) and its gradient M (M^T M)^(-1/2): ranks sum
    M^T M, a number a pair of classes, and have the same norm as one. The published loop takes it
    of each rank's share, which is another method at every number of ranks; and rises by epochs.
    """

    title = "NuAT"
    about = (
        "On clean images, and on logits near theirs for adversarial images, made in one step; "
        "near in the nuclear norm of the batch, which in every other batch guides the step."
    )

    def __init__(self, options: NuATOptions, task: Task) -> None:
        super().__init__(options, task)
        if task.classes > 10:
            self.caution = (
                f"nuat is not known to work with {task.classes} classes: a benchmark of ResNet-18 "
                f"(arXiv 2604.22853; its attack in train mode) found 14.4 % under AutoAttack on "
                f"CIFAR-100, where PGD had 26.9 %; consistency had 26"
            )

    def distance(self, net: Net, clean: Tensor, adversarial: Tensor) -> Tensor:
        moved = clean - adversarial
        with torch.no_grad():
            direction = moved @ self._inverse_root(net, moved)
        return (direction * moved).sum(1)

    def strength(self, when: When) -> float:
        return when.progress * self.options.strength

    @staticmethod
    def _inverse_root(net: Net, moved: Tensor) -> Tensor:
        """Return (M^T M)^(-1/2) of the global batch, 0 where M^T M is singular."""
        wide = moved.double()
        gram = net.sum_over_ranks(wide.T @ wide)
        # LAPACK raises for NaN. The loss, of the same logits, is NaN then, which ends or skips it.
        values, vectors = torch.linalg.eigh(torch.where(gram.isfinite().all(), gram, 0))
        there = values > 1e-12 * values[-1]
        roots = torch.where(there, values, 1).rsqrt() * there
        return (vectors * roots @ vectors.T).to(moved.dtype)
