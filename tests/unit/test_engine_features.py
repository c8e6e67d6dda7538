"""What the engine adds to any method, against closed forms; whole runs are in tests/parity."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.optim import lr_scheduler

from dist_adv.attacks import frozen
from dist_adv.attacks.threat import L2, Linf
from dist_adv.config import parse_config
from dist_adv.data import Batch, Dataset
from dist_adv.errors import UserError
from dist_adv.methods import BySample, Objective, Step
from dist_adv.methods.gradalign import GradAlign
from dist_adv.training import meter as meter_module
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter
from dist_adv.training.schedule import lr_at


def learner(
    accelerator: Accelerator, digits: Dataset, method: str = "natural", **more: Any
) -> Learner:
    tree = {"method": {"name": method}, "model": {"name": "preact_resnet18", "width": 4}, **more}
    return Learner(parse_config(tree, "test"), accelerator, digits)


def test_smoothed_loss(accelerator: Accelerator, digits: Dataset) -> None:
    """The true class counts 1 - s + s / K, each other s / K."""
    loss = learner(accelerator, digits, train={"label_smoothing": 0.3}).method.task.loss
    logits, y = torch.randn(6, 10), torch.arange(6)
    target = torch.full((6, 10), 0.03).scatter(1, y[:, None], 0.73)
    torch.testing.assert_close(loss(logits, y), -(target * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("schedule", ["cosine", "constant", "multistep"])
def test_rates_that_warm_up(schedule: str) -> None:
    """torch's LinearLR from the first update's part on, and then its own schedule."""
    warm, total, peak = 5, 40, 0.3
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], peak)
    after = {
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(sgd, total - warm),
        "constant": lambda: lr_scheduler.ConstantLR(sgd, factor=1),
        "multistep": lambda: lr_scheduler.MultiStepLR(
            sgd, [total // 2 - warm, 3 * total // 4 - warm]
        ),
    }[schedule]()
    linear = lr_scheduler.LinearLR(sgd, 1 / warm, total_iters=warm - 1)
    both = lr_scheduler.SequentialLR(sgd, [linear, after], [warm])
    for step in range(total):
        assert lr_at(schedule, peak, step, total, warmup=warm) == pytest.approx(
            sgd.param_groups[0]["lr"]
        )
        sgd.step()
        both.step()


@pytest.mark.parametrize("batch_size", [60, 120])
def test_the_horizon_is_of_epochs_at_any_batch_size(
    batch_size: int, accelerator: Accelerator, digits: Dataset
) -> None:
    """What a constant change leaves behind after two epochs is exp(-1)."""
    average = {"epochs": 2}
    train = {"batch_size": batch_size}
    it = learner(accelerator, digits, "free", average=average, train=train)
    steps = 2 * 8 * it.loader.batches
    assert it.average is not None
    assert it.average.decay**steps == pytest.approx(math.exp(-1), rel=0.02)


def test_average_of_a_jump(accelerator: Accelerator, digits: Dataset) -> None:
    """d = min(decay, (1 + t) / (10 + t)); BatchNorm's statistics as well."""
    it = learner(accelerator, digits, average={"epochs": 3})
    assert it.average is not None
    zero = [each.clone() for each in it.average.average]
    with torch.no_grad():
        for each in it.average.trained:
            each += 1
    left = 1.0
    for step in range(12):
        it.average.update(step)
        left *= min(it.average.decay, (1 + step) / (10 + step))
    for now, before in zip(it.average.average, zero, strict=True):
        torch.testing.assert_close(now, before + 1 - left)
    names = {name for name, _ in it.average.network.named_buffers() if "running_" in name}
    assert len(zero) == len(names) + len(list(it.net.bare.parameters()))


def awp(accelerator: Accelerator, digits: Dataset) -> tuple[Learner, Batch]:
    it = learner(accelerator, digits, awp={"gamma": 0.1}, train={"batch_size": 60})
    return it, next(it.loader.epoch(0))


def objective(it: Learner, batch: Batch, factor: float = 1.0) -> Objective:
    def objective() -> Step:
        logits = it.net(batch.x)
        return Step(factor * F.cross_entropy(logits, batch.y), logits)

    return objective


def test_weights_go_uphill_by_their_own_measure_and_come_back(
    accelerator: Accelerator, digits: Dataset
) -> None:
    it, batch = awp(accelerator, digits)
    model, perturbation = it.net.bare, it.perturbation
    assert perturbation is not None
    before = {name: each.clone() for name, each in model.state_dict().items()}
    loss = objective(it, batch)().loss
    model.load_state_dict(before)
    with perturbation.worst_weights_nearby([(objective(it, batch), batch.weight)]):
        for name, each in model.named_parameters():
            moved = (each - before[name]).norm()
            expected = 0.1 * before[name].norm() if each.dim() > 1 else torch.tensor(0.0)
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)
        for name, each in model.named_buffers():
            assert each.equal(before[name]), name
        assert objective(it, batch)().loss > loss
    for name, each in model.named_parameters():
        assert each.equal(before[name]), name
        assert each.grad is None


def test_a_probe_that_is_not_finite_moves_nothing(
    accelerator: Accelerator, digits: Dataset
) -> None:
    it, batch = awp(accelerator, digits)
    before = [each.clone() for each in it.net.bare.parameters()]
    assert it.perturbation is not None
    broken = objective(it, batch, float("nan"))
    with it.perturbation.worst_weights_nearby([(broken, batch.weight)]):
        pairs = zip(it.net.bare.parameters(), before, strict=True)
        assert all(each.equal(old) for each, old in pairs)


@pytest.mark.parametrize("ball", [Linf(0.4), L2(0.4)], ids=["linf", "l2"])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_ball_that_is_warmed_up(ball: Linf | L2, share: float) -> None:
    part = ball.at(share)
    assert (part.eps, part.share) == (share * 0.4, share)
    keys, x = torch.arange(5), torch.full((5, 1, 4, 4), 0.5)
    for delta in (part.random(keys, x.shape), part.project(torch.ones_like(x), x)):
        size = delta.abs().amax() if part.norm == "linf" else delta.flatten(1).norm(dim=1).max()
        assert size <= share * 0.4 + 1e-6
        assert delta.isfinite().all()


def test_scalars_are_means_over_samples(accelerator: Accelerator) -> None:
    meter, y = Meter(torch.device("cpu")), torch.tensor([0, 1, 1])
    for value, n in ((1.0, 3), (4.0, 1), (float("nan"), 2)):
        loss = torch.tensor(value)  # of one that is not finite nothing counts
        meter.add(Step(loss, torch.zeros(n, 2), {"double": 2 * loss}), y[:n])
    meter.take(accelerator)
    assert meter.means == {"double": pytest.approx(2 * (3 * 1 + 1 * 4) / 4)}
    meter.take(accelerator)
    assert meter.means == {}


@pytest.mark.parametrize("held", [1, 2, 3, 256])
def test_the_meter_counts_steps_as_one_by_one(
    held: int, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are held: of other sizes, without scalars, with one that changes later."""
    monkeypatch.setattr(meter_module, "_HELD", held)
    meter, changing = Meter(torch.device("cpu")), torch.zeros(())
    draw = torch.Generator().manual_seed(0)
    expected = [0.0, 0, 0, 0.0]
    for step, n in enumerate((4, 4, 3, 4, 4, 1, 3)):
        logits, y = torch.randn(n, 5, generator=draw), torch.randint(5, (n,), generator=draw)
        loss = torch.tensor(math.inf) if step == 3 else F.cross_entropy(logits, y)
        changing.fill_(step)
        meter.add(Step(loss, logits, {} if step == 4 else {"changing": changing}), y)
        if step != 3:
            right = sum(int(row.argmax()) == int(true) for row, true in zip(logits, y, strict=True))
            new = n * loss.item(), right, n, 0 if step == 4 else n * step
            expected = [a + b for a, b in zip(expected, new, strict=True)]
    loss_sum, correct, samples, _ = meter.take(accelerator).tolist()
    assert (correct, samples) == (expected[1], expected[2])
    assert loss_sum == pytest.approx(expected[0], rel=1e-14)
    assert meter.means == {"changing": pytest.approx(expected[3] / samples)}


def test_frozen_layers_get_their_own_modes_back() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Sequential(nn.BatchNorm2d(1).eval()))
    before = [each.training for each in model.modules()]
    with frozen(model, eval_mode=True):
        assert not any(each.training for each in model.modules())
    assert [each.training for each in model.modules()] == before
    with frozen(model):
        assert [each.training for each in model.modules()] == before


def test_a_table_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as of a machine of a MiB. A stand-in for the kernel's answer."""
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 256}.get(name, 4096))
    BySample(1000, torch.Size((3, 8, 8)), torch.device("cpu"), torch.int8)
    said = r"takes 6,144,000 bytes and this machine has 1,048,576; .* \(int8, float16\)"
    with pytest.raises(UserError, match=said):
        BySample(1000, torch.Size((3, 32, 32)), torch.device("cpu"), torch.float16)


def test_averaged_logits_are_those_of_the_average(
    accelerator: Accelerator, digits: Dataset
) -> None:
    it = learner(accelerator, digits, average={"epochs": 3})
    x = torch.rand(3, 1, 8, 8)
    expected = it.copy.eval()(x)
    with torch.no_grad():
        for each in it.net.bare.parameters():
            each += 1
    torch.testing.assert_close(it.net.averaged(x), expected)
    assert not it.net.averaged(x).requires_grad


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"average": {"epochs": 0}}, r"average\.epochs: .*greater than 0"),
        ({"awp": {"gamma": 0}}, r"awp\.gamma: .*greater than 0"),
        ({"method": {"name": "n-fgsm"}, "threat": {"norm": "l2"}}, "n-fgsm is made for linf, not"),
        (
            {"method": {"name": "gradalign"}, "train": {"compile": "default"}},
            r"train\.compile: gradalign differentiates a gradient",
        ),
        ({"optim": {"nesterov": True, "name": "adamw"}}, r"optim\.nesterov: is a way of SGD"),
        ({"optim": {"warmup": 2}}, r"optim\.warmup: the cyclic rate rises by itself"),
        ({"train": {"label_smoothing": 1}}, r"train\.label_smoothing: .*less than 1"),
    ],
)
def test_what_makes_no_sense_is_said(tree: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_config({"method": {"name": "natural"}, **tree}, "test")


def test_gradalign_counts_the_samples_that_have_an_angle() -> None:
    """The engine's mean of two ranks' shares is the mean over the counted samples of both."""
    here, there = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    here[0], there[3] = 0, 0
    counted = F.cosine_similarity(here.flatten(1), there.flatten(1), dim=1)[[1, 2, 4]]
    found = torch.tensor(0.0)
    for mine in (slice(0, 2), slice(2, 5)):
        share = SimpleNamespace(total=5)
        net = SimpleNamespace(sum_over_ranks=lambda own: torch.tensor(3.0))
        cosine = GradAlign._mean_cosine(None, net, share, here[mine], there[mine])
        found += cosine * len(here[mine]) / 5  # a loss is weighted by the rank's share
    torch.testing.assert_close(found, counted.mean())
