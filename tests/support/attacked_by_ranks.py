"""Judge a network by AutoAttack, briefly, under whatever launcher started this.

Argument: where the first process writes what came out. `judged` does it in this process.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from colours import colours
from dist_adv.attacks.autoattack import AutoAttack
from dist_adv.attacks.threat import build
from dist_adv.config import EvalOptions
from dist_adv.distributed.start import start_accelerator
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.evaluation.images import Images


def shorten(attack: AutoAttack, steps: int, queries: int) -> None:
    for name, (search, targets) in attack.searches.items():
        budget = {"queries": queries} if name == "square" else {"steps": steps}
        attack.searches[name] = (replace(search, **budget), targets)


@contextmanager
def short(steps: int, queries: int) -> Iterator[None]:
    """AutoAttack is itself, of fewer steps and queries."""
    before = AutoAttack.__init__

    def brief(self: AutoAttack, *arguments: Any) -> None:
        before(self, *arguments)
        shorten(self, steps, queries)

    with mock.patch.object(AutoAttack, "__init__", brief):
        yield


class Planes(nn.Module):
    """Linear, in fp64: what falls does not depend on the images beside it."""

    def __init__(self) -> None:
        super().__init__()
        data = colours(400)
        x = data.images.flatten(1).double() / 255
        means = torch.stack([x[data.labels == k].mean(0) for k in range(10)])
        self.register_buffer("weight", means)
        self.register_buffer("bias", -means.square().sum(1) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.flatten(1).double(), self.weight, self.bias)


def judged(accelerator: Accelerator, batch_size: int, eps: float = 0.06) -> dict[str, Any]:
    """37 images, of which a last round has fewer than four ranks have room for."""
    options = EvalOptions(attacks=["natural", "autoattack"], batch_size=batch_size)
    shares: list[int] = []
    share = Images.share

    def counted(self: Images, rows: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        rows = share(self, rows)
        shares.append(len(rows[0]))
        return rows

    with short(steps=2, queries=30), mock.patch.object(Images, "share", counted):
        (natural, result), _ = evaluate(
            Planes(), colours(37, seed=1), build("linf", eps), options, accelerator
        )
    found = {"natural": natural.correct, "correct": result.correct, "loss": result.loss}
    return found | {"shares": gather_object([shares])}


if __name__ == "__main__":
    accelerator = start_accelerator("fp32", threads=1)
    found = judged(accelerator, batch_size=3)
    found["all fall"] = judged(accelerator, batch_size=3, eps=0.9)["correct"]
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
