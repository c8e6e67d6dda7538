"""Which BatchNorm statistics serve averaged weights: one training run, several averages of it.

    python benchmarks/averaged_batchnorm.py OUT.jsonl configs/cifar10/fast.yaml train.epochs=8 ...

After every `eval.every` epochs, and the first: `raw`, the network in training; ramp-1, an average
with a horizon of one epoch and the smaller decay of the first steps that `average` has; plain-1,
one with the same decay from the first step on. Statistics: `average`, averaged likewise;
`recompute`, anew from 5,000 clean training images; `attacked`, anew from what Fast's two forward
passes see of as many.
"""

import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dist_adv.attacks import ascend, frozen
from dist_adv.config import EvalOptions, load_config
from dist_adv.data import Batch, load_dataset
from dist_adv.distributed.collectives import mean_statistics
from dist_adv.distributed.start import start_accelerator
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.training.averages import Average
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter

IMAGES = 5_000


class Plain(Average):
    """The same decay from the first step on."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.average, self.trained, 1 - self.decay)


class Some:
    """A loader of the first images of an epoch; with a model, also what Fast makes of them."""

    def __init__(self, learner: Learner, attacked: nn.Module | None = None) -> None:
        self.learner, self.attacked = learner, attacked

    def epoch(self, epoch: int) -> Iterator[Batch]:
        learner = self.learner
        for batch in islice(learner.loader.epoch(epoch), IMAGES // learner.loader.batch_size):
            yield replace(batch, x=self._moved(batch)) if self.attacked else batch

    def _moved(self, batch: Batch) -> torch.Tensor:
        """As in `methods.fast`. Its forward pass at the start moves the statistics, too."""
        x, y, threat = batch.x, batch.y, self.learner.threat
        start = threat.project(threat.random(batch.keys, x.shape), x)
        with torch.enable_grad(), frozen(self.attacked) as model:
            return x + ascend(model, x, y, start, threat, 1, self.learner.config.method.alpha)


@torch.no_grad()
def recompute_statistics(
    accelerator: Accelerator, model: nn.Module, loader: Any, epoch: int
) -> None:
    """Take a network's statistics anew, the mean over batches (Izmailov et al. 2018)."""
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    model.train()
    for batch in loader.epoch(epoch):
        model(batch.x)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    model.eval()
    model.load_state_dict(mean_statistics(accelerator, model.state_dict()))


def main(out: str, path: str, *overrides: str) -> None:
    config = load_config(path, overrides)
    accelerator = start_accelerator(config.train.precision, config.train.threads)
    data, test = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    learner = Learner(config, accelerator, data)
    options = EvalOptions(attacks=["natural", "pgd-10"], limit=config.eval.curve_limit)
    network = learner.copy

    def measured() -> dict[str, float]:
        (natural, pgd), _ = evaluate(network, test, learner.threat, options, accelerator)
        return {"natural": natural.accuracy, "pgd": pgd.accuracy, "loss": natural.loss}

    def average(kind: type[Average], epochs: int) -> Average:
        made = kind(copy.deepcopy(network), learner.net)
        made.decay = 1 - 1 / (epochs * learner.loader.batches)
        return made

    averages = {
        "ramp-1": average(Average, 1),
        "plain-1": average(Plain, 1),
    }
    meter = Meter(accelerator.device)
    learner.settle()
    for epoch in range(config.train.epochs):
        began = time.perf_counter()
        for batch in learner.loader.epoch(epoch):
            learner.learn(batch, meter)
            learner.clock.batch += 1
            for each in averages.values():
                each.update(learner.clock.step - 1)
        learner.clock.epoch, learner.clock.batch = epoch + 1, 0
        if epoch and (epoch + 1) % config.eval.every:
            continue
        seconds = time.perf_counter() - began
        lr = learner.lr_and_momentum(learner.clock.step - 1)[0]
        line: dict[str, Any] = {"epoch": epoch + 1, "lr": lr, "seconds": seconds}
        network.load_state_dict(learner.net.state_dict())
        line["raw"] = measured()
        for name, source in averages.items():
            for kind in ("average", "recompute", "attacked"):
                source.copy_into(accelerator, network)
                if kind != "average":
                    loader: Any = Some(learner, network if kind == "attacked" else None)
                    recompute_statistics(accelerator, network, loader, epoch + 1)
                line[f"{name}/{kind}"] = measured()
        print(json.dumps(line), flush=True)
        with open(out, "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
