"""Compiled networks on a GPU: the updates of one that is not, and all passes replayed.

Most are of a network of two layers, whose five graphs are compiled once for all methods.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from cases import config
from dist_adv.config import parse_config
from dist_adv.data import load_dataset
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter

# What would read overwritten results if batches were not marked; attacks in each mode; all that
# asks twice: parts of a batch, perturbed weights, a forward that is differentiated twice.
RECORDED = ("free", "aaer", "gat", "cuap", "sora", "liet", "adr", "awp-trades", "in parts")
COMPILED = [("graphs", case) for case in RECORDED] + [("default", "free")]


@pytest.fixture
def double() -> Iterator[None]:
    """fp64: in fp32 another order of sums turns the sign of some input gradient."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tree(case: str, images: Path, **train: Any) -> dict[str, Any]:
    """Three batches of 40 an epoch: torch warms up, records, and replays from the third on."""
    made = config("pgd-random" if case == "in parts" else case, "batch", images)
    made["model"] = {"name": "made_up_method:Tiny"}
    parts = 2 if case == "in parts" else 1
    made["train"] |= {"batch_size": 40, "accumulate": parts, "epochs": 2} | train
    return made


def learnt(learner: Learner) -> dict[str, Tensor]:
    meter = Meter(learner.accelerator.device)
    for epoch in range(learner.config.train.epochs):
        for batch in learner.loader.epoch(epoch):
            learner.learn(batch, meter)
    learner.check_updates()
    learner.update_copy()
    return learner.copy.state_dict()


def learner_of(settings: dict[str, Any], accelerator: Any) -> Learner:
    torch.compiler.reset()
    parsed = parse_config(settings, "test")
    return Learner(parsed, accelerator, load_dataset(parsed.data, "train"))


def recorded() -> int:
    """Return how often torch has recorded a pass, times the inputs that it copies each time."""
    return counters["inductor"]["cudagraph_recorded_non_static_inputs"]


def check_recorded(learner: Learner, before: int) -> None:
    if learner.accelerator.device.type == "cpu":
        return  # a dry run
    assert learner.skipped_graphs is not None
    assert learner.skipped_graphs.news() == ""
    assert recorded() > before


def test_a_real_network_is_recorded_whole_and_its_memory_does_not_grow(gpu, started, colour):
    """In bf16, as a run begins: the first batches warm up and record, 200 further ones replay."""
    made = config("fast-random", "batch", colour, "auto")
    made["model"] = {"name": "preact_resnet18", "width": 16}
    made["train"] |= {"batch_size": 128, "compile": "graphs", "epochs": 4}
    made["data"] |= {"drop_last": True}
    before = recorded()
    learner = learner_of(made, started("auto"))
    learnt(learner)
    check_recorded(learner, before)
    assert growth(learner, gpu, 5 if gpu.type == "cpu" else 200) == 0


@pytest.mark.parametrize(("choice", "case"), COMPILED)
def test_compiled_takes_the_same_updates(choice, case, double, started, images):
    accelerator = started("fp32")
    plain = learnt(learner_of(tree(case, images), accelerator))
    before = recorded()
    learner = learner_of(tree(case, images, compile=choice), accelerator)
    compiled = learnt(learner)
    difference = max((compiled[name] - plain[name]).abs().max().item() for name in plain)
    assert difference < 1e-10
    if choice == "graphs":
        check_recorded(learner, before)


@pytest.mark.parametrize("case", ["free", "prior", "awp-trades"])
def test_memory_does_not_grow(case, gpu, started, images):
    learner = learner_of(tree(case, images), started("auto"))
    learnt(learner)
    assert growth(learner, gpu, 200) == 0


def growth(learner: Learner, gpu: torch.device, steps: int) -> int:
    """Bytes that are in use after so many further batches and were not before."""
    batches = list(learner.loader.epoch(0))

    def learnt(number: int) -> int:
        # What is kept until it is looked at, numbers of each step, is no growth. So far beyond the
        # end of its schedule a run may diverge: that is none of this test's.
        learner.learn(batches[number % len(batches)], Meter(gpu))
        learner.nonfinite.trouble(learner.accelerator)
        return in_use(gpu)

    before = learnt(0)
    for step in range(steps):
        learnt(step)
    return learnt(0) - before


def in_use(gpu: torch.device) -> int:
    return torch.cuda.memory_allocated() if gpu.type == "cuda" else 0
