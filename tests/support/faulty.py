"""dist_adv with one fault built in, which FAULT describes; run as `python -m faulty`.

nan:RANK:STEP[:STEP...]    the loss of that rank is NaN at these optimiser steps (from 1)
inf:RANK:STEP              the loss is infinite, its gradient is not
poison:RANK:STEP           the images are NaN, and so is what BatchNorm sees of them
sleep:RANK:STEP            the rank stops there without a word
oom:RANK:STEP              the rank asks for more memory than any machine has
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from dist_adv import cli, train
from dist_adv.methods import Step, build_method

KIND, RANK, *STEPS = os.environ["FAULT"].split(":")


class Faulty:
    """A method as it is, but for one rank at some steps."""

    def __init__(self, *arguments: object) -> None:
        self.method = build_method(*arguments)
        self.done = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.method, name)

    def steps(self, net: object, batch: object) -> Iterator[Step]:
        mine = os.environ.get("RANK", "0") == RANK
        if KIND == "poison" and mine and str(self.done + 1) in STEPS:
            batch = replace(batch, x=batch.x * float("nan"))
        for out in self.method.steps(net, batch):
            self.done += 1
            yield fault(out) if mine and str(self.done) in STEPS else out


def fault(out: Step) -> Step:
    match KIND:
        case "nan":
            return Step(out.loss * float("nan"), out.logits)
        case "inf":
            return Step(out.loss + float("inf"), out.logits)
        case "poison":
            return out
        case "sleep":
            time.sleep(3600)
        case "oom":
            torch.empty(2**60, dtype=torch.uint8)
    raise AssertionError(KIND)


if __name__ == "__main__":
    train.build_method = Faulty
    cli.main()
