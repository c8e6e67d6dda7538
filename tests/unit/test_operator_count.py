"""How many operators a training step dispatches besides the network's own passes.

On a GPU a batch of 128 small images takes longer to launch than to compute, so that each operator
of the loop's own costs as much as a layer. Counted, not timed.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from dist_adv.attacks import frozen
from dist_adv.config import parse_config
from dist_adv.data import Batch, Dataset
from dist_adv.distributed.start import as_it_was, start_accelerator
from dist_adv.training import meter as meter_module
from dist_adv.training import nonfinite
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter
from operators import Operators, launches

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("operator", "launching"),
    [
        (aten.view.default, False),
        (aten.view.dtype, False),
        (aten.expand.default, False),
        (aten.t.default, False),
        (aten.unbind.int, False),
        (aten.split_with_sizes.default, False),
        (aten.detach.default, False),
        (aten.as_strided.default, False),
        (aten.empty_like.default, False),
        (aten.add.Tensor, True),
        (aten.add_.Tensor, True),
        (aten.add.out, True),
        (aten.clone.default, True),
        (aten.zeros.default, True),
        (aten._to_copy.default, True),
        (aten._foreach_norm.Scalar, True),
        (aten._foreach_copy_.default, True),
        (aten._fused_sgd_.default, True),
        (aten._amp_foreach_non_finite_check_and_unscale_.default, True),
    ],
)
def test_what_launches(operator: torch._ops.OpOverload, launching: bool) -> None:
    assert launches(operator) == launching


@pytest.fixture(params=["fp32", "bf16"])
def of_precision(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    """One process on the CPU that trains in a precision."""
    with pytest.MonkeyPatch.context() as patch, as_it_was():
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield start_accelerator(request.param, threads=1)


def learner_of(accelerator: Accelerator, data: Dataset, **sections: Any) -> Learner:
    tree = {"model": {"name": "preact_resnet18", "width": 4}, **sections}
    return Learner(parse_config(tree, "test"), accelerator, data)


def own(learner: Learner, batch: Batch, attacks: int, updates: int) -> Operators:
    """Count the network's own operators: `attacks` input gradients, `updates` updates.

    Each is the bare pass and nothing else: for an input gradient the forward with frozen weights,
    the mean cross-entropy, and its backward to the images; for an update forward, mean
    cross-entropy, backward to the weights (Free's to the images, too), and the fused optimiser's
    step. Precision, layout and optimiser are those of the run.
    """
    free = learner.config.method.name == "free"
    with frozen(learner.net.bare):
        x = batch.x.clone().requires_grad_()
        with Operators() as seen:
            for _ in range(attacks):
                torch.autograd.grad(F.cross_entropy(learner.net.bare(x), batch.y), x)
    x = batch.x.clone()
    for _ in range(updates):
        x = x.detach().requires_grad_(free)
        with seen:
            F.cross_entropy(learner.net(x), batch.y).backward()
            learner.net.plain.step()
        learner.net.plain.zero_grad()
    return seen


def of_a_step(learner: Learner, meter: Meter | None = None) -> tuple[Operators, Batch]:
    """Count what `learn` does with the second batch; the first one makes what is kept."""
    first, second, *_ = learner.loader.epoch(0)
    meter = meter or Meter(learner.accelerator.device)
    learner.learn(first, meter)
    with Operators() as seen:
        learner.learn(second, meter)
    return seen, second


FAST, FREE, PGD = {"name": "fast"}, {"name": "free", "replays": 3}, {"name": "pgd", "steps": 7}
# What is configured; input gradients and updates of a batch; and what it may take besides. Watching
# and metering an update are 4, a random start 12, the room around the images 2, the perturbation
# cut to it and added to them 2, and a step along the gradient 2.
CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "natural": ({"method": {"name": "natural"}}, 0, 1, 4),
    "fast": ({"method": FAST}, 1, 1, 24),
    "fast, skipping": ({"method": FAST, "train": {"on_nan": "skip"}}, 1, 1, 27),
    "free": ({"method": FREE}, 0, 3, 27),
    "pgd": ({"method": PGD}, 7, 1, 48),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_few_operators_besides_the_network_s(
    case: str, of_precision: Accelerator, digits: Dataset
) -> None:
    """A batch on one rank: the method, the watch for NaN, the meter, and all else in `learn`.

    Not in it is what is counted once in 256 steps (see below), nor what makes the batch.
    """
    sections, attacks, updates, most = CASES[case]
    learner = learner_of(of_precision, digits, **sections)
    seen, batch = of_a_step(learner)
    passes = own(learner, batch, attacks, updates).total
    besides = seen.total - passes
    assert besides >= 4, "less than what watches and meters: the passes are counted wrongly"
    assert besides <= most, f"{besides} besides the network's own {passes}:\n{seen}"


def test_counting_what_is_held_takes_little(
    accelerator: Accelerator, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 256 steps together less than one operator for five of them."""
    learner = learner_of(accelerator, digits, method={"name": "natural"})
    usual, _ = of_a_step(learner)
    for module in (meter_module, nonfinite):
        assert module._HELD == 256
        monkeypatch.setattr(module, "_HELD", 2)
    learner = learner_of(accelerator, digits, method={"name": "natural"})
    counting, _ = of_a_step(learner)
    assert 0 < counting.total - usual.total < 256 / 5, str(counting)


def test_a_batch_is_made_in_few(accelerator: Accelerator, digits: Dataset) -> None:
    """Gathered, cropped and flipped by indices; labels and images as floats."""
    learner = learner_of(accelerator, digits, method={"name": "natural"})
    batches = learner.loader.epoch(0)
    next(batches)
    with Operators() as seen:
        next(batches)
    assert seen.total <= 9, str(seen)
