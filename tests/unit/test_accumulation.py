"""A batch that is taken in parts: the same update for every method, or one line."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cases import CASES, config
from dist_adv.config import parse_config
from dist_adv.data import Loader, load_dataset
from dist_adv.distributed.ddp import TrainNet
from dist_adv.errors import UserError
from dist_adv.plan.measure import Images, cost, works_of
from dist_adv.plan.model import Cluster, Link, StepTime, predict
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter

# What computes over the whole batch, or keeps something for each of its positions.
REFUSED = {
    *("free", "fast-previous", "average", "carrying", "cuap", "uap", "nuat", "sora", "aaer"),
    "gradalign",
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learnt(
    case: str, parts: int, images: Path, accelerator: Accelerator
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights after an epoch of four batches, and [loss, correct, samples] of it."""
    tree = config(case, "group", images, small=True)
    tree["train"] |= {"batch_size": 36, "epochs": 1, "accumulate": parts}
    settings = parse_config(tree, case)
    learner = Learner(settings, accelerator, load_dataset(settings.data, "train"))
    meter = Meter(accelerator.device)
    for batch in learner.loader.epoch(0):
        learner.learn(batch, meter)
    return learner.net.state_dict(), meter.take(accelerator)[:3].tolist()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("stages", "accumulate")])
def test_parts_of_a_batch_are_its_update(case, images, accelerator):
    if case in REFUSED:
        with pytest.raises(UserError, match=r"^train\.accumulate: \S+ computes over whole batches"):
            learnt(case, 3, images, accelerator)
        return
    whole, of_whole = learnt(case, 1, images, accelerator)
    parts, of_parts = learnt(case, 3, images, accelerator)
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < 1e-10
    assert of_parts == pytest.approx(of_whole, rel=1e-9)


def test_examples_of_a_batch_in_parts_are_made_once(images, accelerator, monkeypatch):
    """Ranks may have more and fewer parts; where they add up something, all do it as often."""
    asked = []
    monkeypatch.setattr(TrainNet, "sum_over_ranks", lambda net, value: asked.append(1) or value)
    learnt("liet", 3, images, accelerator)
    assert len(asked) == 2  # of four batches: once in three


def test_parts_share_what_a_batch_has(images):
    """As equal as can be, in order, with weights that add up; no more parts than images."""
    settings = parse_config(config("natural", "group", images), "natural")
    loader = Loader(load_dataset(settings.data, "train"), 33, 0, torch.device("cpu"))
    batch = next(loader.epoch(0))
    parts = batch.parts(4)
    assert [len(part.x) for part in parts] == [9, 8, 8, 8]
    assert sum(part.weight for part in parts) == pytest.approx(batch.weight)
    for name in ("x", "y", "samples", "keys"):
        assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(batch, name))
    assert len(batch.parts(50)) == 33
    assert batch.parts(1) == [batch]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"batch_size": 33, "accumulate": 2}, "33 does not divide into 2 parts on each of 1 rank"),
        ({"batch_size": 40, "accumulate": 40}, "leaves a rank 1 image in some batch"),
        ({"batch_size": 36, "accumulate": 18}, "leaves a rank 1 image in some batch"),  # of 12
    ],
)
def test_what_cannot_be_parted_is_one_line(keys, line, images, accelerator):
    tree = config("natural", "batch", images, small=True)
    tree["train"] |= keys
    settings = parse_config(tree, "natural")
    with pytest.raises(UserError) as error:
        Learner(settings, accelerator, load_dataset(settings.data, "train"))
    assert line in str(error.value)


def test_a_loss_that_is_not_finite_in_any_part_is_seen(images, accelerator):
    tree = config("natural", "group", images, small=True)
    tree["train"] |= {"batch_size": 36, "accumulate": 3, "on_nan": "skip"}
    settings = parse_config(tree, "natural")
    learner = Learner(settings, accelerator, load_dataset(settings.data, "train"))
    batch = next(learner.loader.epoch(0))
    before = {name: each.clone() for name, each in learner.net.state_dict().items()}
    batch.x[14] = float("nan")
    learner.learn(batch, Meter(accelerator.device))
    trouble = learner.nonfinite.trouble(accelerator)
    assert trouble is not None
    assert trouble.count == 1
    assert trouble.ranks == [0]
    assert all(each.equal(before[name]) for name, each in learner.net.state_dict().items())


def test_a_plan_counts_the_floor_of_a_step_for_each_part(images):
    """And refuses what a run would refuse."""
    tree = config("natural", "batch", images, small=True)
    tree["train"] |= {"batch_size": 36, "accumulate": 3}
    settings, few = parse_config(tree, "natural"), Images(120, 3, (8, 8), 3)
    (work,) = (work.timed(StepTime(0.1, 0.01, cost(settings))) for work in works_of(settings, few))
    row = predict(work, Cluster(Link(math.inf)), 2)
    assert row.compute_s == pytest.approx(3 * 0.1 + 18 * 0.01)
    with pytest.raises(UserError, match="36 does not divide into 3 parts on each of 5 rank"):
        predict(work, Cluster(Link(math.inf)), 5)
    with pytest.raises(UserError, match="leaves a rank 1 image in some batch"):
        predict(work, Cluster(Link(math.inf)), 4)  # the last twelve images
