"""dist_adv with one fault built in, which FAULT describes; run as `python -m faulty`.

nan:RANK:STEP[:STEP...]    the loss of that rank is NaN at these optimiser steps (from 1)
inf:RANK:STEP              the loss is infinite, its gradient is not
poison:RANK:STEP           the images are NaN, and so is what BatchNorm sees of them
channel:RANK:STEP          one channel of the first layer has NaN in its gradient, and no loss has
sleep:RANK:STEP            the rank stops there without a word
oom:RANK:STEP              the rank asks for more memory than any machine has
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from dist_adv import cli
from dist_adv.methods import Objective, Step, build_method
from dist_adv.training import learner


class Faulty:
    """A method as it is, but for one rank at some steps."""

    def __init__(self, *arguments: object) -> None:
        self.method = build_method(*arguments)
        self.kind, self.rank, *self.at = os.environ["FAULT"].split(":")
        self.done = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.method, name)

    def steps(self, net: object, batch: object, threat: object) -> Iterator[Objective]:
        mine = os.environ.get("RANK", "0") == self.rank
        next_one = mine and str(self.done + 1) in self.at
        if self.kind == "poison" and next_one:
            batch = replace(batch, x=batch.x * float("nan"))
        with spoilt(net.bare) if self.kind == "channel" and next_one else nullcontext():
            for objective in self.method.steps(net, batch, threat):
                self.done += 1
                faulty = mine and str(self.done) in self.at
                yield partial(fault, self.kind, objective) if faulty else objective


@contextmanager
def spoilt(model: nn.Module) -> Iterator[None]:
    """No other gradient depends on that of the first layer's last channel."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    last = torch.tensor([first.out_channels - 1])

    def spoil(layer: nn.Module, inputs: object, out: torch.Tensor) -> None:
        out.register_hook(lambda gradient: gradient.index_fill(1, last, math.nan))

    handle = first.register_forward_hook(spoil)
    yield
    handle.remove()


def fault(kind: str, objective: Objective) -> Step:
    out = objective()
    match kind:
        case "nan":
            return Step(out.loss * float("nan"), out.logits)
        case "inf":
            return Step(out.loss + float("inf"), out.logits)
        case "poison" | "channel":
            return out
        case "sleep":
            time.sleep(3600)
        case "oom":
            torch.empty(2**60, dtype=torch.uint8)
    raise AssertionError(kind)


if __name__ == "__main__":
    learner.build_method = Faulty
    cli.main()
