"""No update is taken from a loss or a gradient that is not finite; the judge is a plain loop.

The plain loop has torch's own SGD and never sees the bad batches. What is compared is compared
bit for bit.
"""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import config
from dist_adv.config import OptimOptions, parse_config
from dist_adv.data import load_dataset
from dist_adv.distributed.ddp import flag_nonfinite
from dist_adv.distributed.optimizers import fused_optimizer
from dist_adv.errors import RunFailure
from dist_adv.training import nonfinite
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter
from dist_adv.training.nonfinite import NonFinite, Trouble

OPTIM = OptimOptions(lr=0.1, momentum=0.9, weight_decay=5e-4)
KINDS = ["loss nan", "loss inf", "loss -inf", "gradient nan", "gradient inf", "input nan"]


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(10, 6, generator=draw), torch.randint(3, (10,), generator=draw))
        for _ in range(n)
    ]


def loss_of(model: nn.Module, x: Tensor, y: Tensor, kind: str = "") -> Tensor:
    """The loss, with a fault of `kind` where one is named."""
    if kind == "input nan":
        x = x * float("nan")
    logits = model(x)
    if kind.startswith("gradient"):
        logits.register_hook(lambda gradient: gradient * float(kind.split()[1]))
    loss = F.cross_entropy(logits, y)
    match kind:
        case "loss nan":
            return loss * float("nan")
        case "loss inf":
            return loss + float("inf")  # whose own gradient is finite
        case "loss -inf":
            return loss - float("inf")
    return loss


class Guarded:
    """The steps of the training loop on one process."""

    def __init__(self, on_nan: str, optim: OptimOptions = OPTIM, scaled: bool = False) -> None:
        self.model = network()
        self.sgd = fused_optimizer(self.model, optim)
        self.watch = NonFinite(
            self.model, self.sgd, partial(flag_nonfinite, self.model), on_nan, scaled
        )

    def step(self, x: Tensor, y: Tensor, kind: str = "", weight: float = 1.0) -> None:
        loss = loss_of(self.model, x, y, kind)
        loss.backward(self.watch.mark(loss, weight))
        self.watch.before_update(loss)
        self.sgd.step()
        self.sgd.zero_grad()

    def train(self, faults: dict[int, str], n: int) -> "Guarded":
        """`n` updates, numbered from 1, with faults at some."""
        for number, (x, y) in enumerate(batches(n), start=1):
            self.step(x, y, faults.get(number, ""))
        return self


def plain(numbers: list[int], optim: OptimOptions = OPTIM) -> tuple[nn.Module, torch.optim.SGD]:
    """Torch's own loop over only these batches, numbered from 1."""
    model = network()
    sgd = torch.optim.SGD(
        model.parameters(),
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    every = batches(max(numbers, default=0))
    for number in numbers:
        loss_of(model, *every[number - 1]).backward()
        sgd.step()
        sgd.zero_grad()
    return model, sgd


def momentum(sgd: torch.optim.SGD) -> list[Tensor]:
    """Zero where no update was taken yet: torch makes it with the first gradient."""
    parameters = sgd.param_groups[0]["params"]
    found = [sgd.state[parameter].get("momentum_buffer") for parameter in parameters]
    return [
        torch.zeros_like(parameter) if buffer is None else buffer
        for parameter, buffer in zip(parameters, found, strict=True)
    ]


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "running_" in name]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


def agree(guarded: Guarded, model: nn.Module, sgd: torch.optim.SGD) -> None:
    assert same(list(guarded.model.parameters()), list(model.parameters()))
    assert same(momentum(guarded.sgd), momentum(sgd))


@pytest.mark.parametrize("momentum_of", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_fused_sgd_is_plain_sgd(momentum_of, weight_decay):
    """Also while a schedule changes both rates, and with a momentum that starts at zero."""
    optim = OptimOptions(lr=0.1, momentum=momentum_of, weight_decay=weight_decay)
    ours, theirs = network(), network()
    one = fused_optimizer(ours, optim)
    two = torch.optim.SGD(
        theirs.parameters(), 0.1, momentum_of, weight_decay=weight_decay, fused=True
    )
    for number, (x, y) in enumerate(batches(12)):
        for model, sgd in ((ours, one), (theirs, two)):
            sgd.param_groups[0]["lr"] = 0.1 / (1 + number)
            if momentum_of:
                sgd.param_groups[0]["momentum"] = momentum_of - 0.01 * number
            loss_of(model, x, y).backward()
            sgd.step()
            sgd.zero_grad()
        assert same(list(ours.parameters()), list(theirs.parameters())), number
    assert same(momentum(one), momentum(two))
    assert not same(list(ours.parameters()), list(network().parameters()))


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_good_updates_are_untouched(on_nan):
    """Watching alone changes no bit, of the statistics neither."""
    guarded, (model, sgd) = Guarded(on_nan).train({}, 6), plain([1, 2, 3, 4, 5, 6])
    agree(guarded, model, sgd)
    assert same(statistics(guarded.model), statistics(model))


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_update_changes_nothing(kind, on_nan, first):
    """Weights and momentum stay as they were, also where there never was another update."""
    guarded = Guarded(on_nan).train({first: kind}, first)
    agree(guarded, *plain(list(range(1, first))))


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_stop_is_for_good(kind, first):
    """From the first bad update on none is taken, however good."""
    guarded = Guarded("stop").train({first: kind}, 7)
    agree(guarded, *plain(list(range(1, first))))


@pytest.mark.parametrize("bad", [[1], [3], [1, 2], [2, 5, 6], [7]])
@pytest.mark.parametrize("kind", KINDS)
def test_skip_passes_over_bad_updates_alone(kind, bad):
    """The run is one that never saw those batches, BatchNorm's statistics included."""
    guarded = Guarded("skip").train(dict.fromkeys(bad, kind), 7)
    model, sgd = plain([number for number in range(1, 8) if number not in bad])
    agree(guarded, model, sgd)
    assert same(statistics(guarded.model), statistics(model))
    assert all(buffer.isfinite().all() for buffer in statistics(guarded.model))


def test_skip_without_momentum():
    optim = OptimOptions(lr=0.1, momentum=0.0, weight_decay=0.0)
    guarded = Guarded("skip", optim).train({1: "loss nan", 3: "loss inf"}, 5)
    model, _ = plain([2, 4, 5], optim)
    assert same(list(guarded.model.parameters()), list(model.parameters()))


def test_statistics_to_go_back_to_are_those_of_the_restored_model():
    """`restart`: a resumed run whose first update is bad keeps what it was given."""
    guarded = Guarded("skip")
    with torch.no_grad():
        for number, buffer in enumerate(statistics(guarded.model)):
            buffer.fill_(number + 0.5)
    guarded.watch.restart()
    before = copy.deepcopy(statistics(guarded.model))
    guarded.train({1: "loss nan"}, 1)
    assert same(statistics(guarded.model), before)


@pytest.mark.parametrize("weight", [1.0, 0.5, 1.03125, 0.0])
def test_mark(weight):
    """The weight itself for a finite loss, NaN for every other; no gradient of its own."""
    for value in (0.0, -3.0, 1e38):
        assert NonFinite.mark(torch.tensor(value), weight).item() == weight
    for value in (float("nan"), float("inf"), -float("inf")):
        assert NonFinite.mark(torch.tensor(value), weight).isnan()
    assert not NonFinite.mark(torch.tensor(1.0, requires_grad=True), weight).requires_grad


def test_infinite_loss_with_a_finite_gradient_is_told_to_the_other_ranks():
    """They see nothing but gradients: every one of them must be NaN."""
    model = network()
    x, y = batches(1)[0]
    loss = loss_of(model, x, y, "loss inf")
    loss.backward(NonFinite.mark(loss, 0.5))
    assert all(parameter.grad.isnan().all() for parameter in model.parameters())


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ({}, None),
        ({1: "loss nan"}, Trouble(1, 1, [0])),
        ({3: "loss nan", 5: "loss inf"}, Trouble(2, 3, [0])),
        ({4: "gradient nan"}, Trouble(1, 4, [])),
        ({2: "gradient inf", 6: "loss nan"}, Trouble(2, 2, [])),
        ({2: "loss nan", 6: "gradient inf"}, Trouble(2, 2, [0])),
    ],
)
def test_what_is_told(faults, told, on_nan, accelerator):
    guarded = Guarded(on_nan).train(faults, 7)
    assert guarded.watch.trouble(accelerator) == told
    assert guarded.watch.seen == 7
    assert guarded.watch.trouble(accelerator) == told  # asking changes nothing


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ([[9, 0, 0, 0], [9, 0, 0, 0]], None),
        ([[9, 1, 4, 0], [9, 1, 4, 4]], Trouble(1, 4, [1])),
        ([[9, 2, 4, 4], [9, 2, 4, 6], [9, 2, 4, 4]], Trouble(2, 4, [0, 2])),
        ([[9, 2, 4, 0], [9, 2, 4, 6]], Trouble(2, 4, [])),
        ([[9, 0, 0, 0], [9, 3, 5, 5]], Trouble(3, 5, [1])),
    ],
)
def test_what_several_ranks_tell(counts, told):
    """[seen, bad, first bad, first bad of its own] of each; a stand-in gathers them."""
    gathered = SimpleNamespace(gather=lambda mine: torch.tensor(counts))
    assert Guarded("skip").watch.trouble(gathered) == told


def test_overflow_under_loss_scaling_is_the_scalers(accelerator):
    """fp16 gradients overflow daily; only a loss that is not finite is trouble."""
    for kind, told in (("gradient inf", None), ("loss inf", Trouble(1, 2, [0]))):
        guarded = Guarded("skip", scaled=True).train({2: kind}, 2)
        assert guarded.watch.trouble(accelerator) == told


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize("bad", [[2], [3], [4], [3, 4], [6, 9]])
def test_updates_are_counted_a_few_at_a_time(bad, on_nan, accelerator, monkeypatch):
    """The last of those that are held and the first after them are updates like any other."""
    monkeypatch.setattr(nonfinite, "_HELD", 3)
    guarded = Guarded(on_nan).train(dict.fromkeys(bad, "loss inf"), 10)
    assert guarded.watch.trouble(accelerator) == Trouble(len(bad), bad[0], [0])
    last = 10 if on_nan == "skip" else bad[0] - 1
    agree(guarded, *plain([number for number in range(1, last + 1) if number not in bad]))


def test_large_gradients_are_finite(accelerator):
    """Though the square of one is not."""
    guarded = Guarded("stop")
    guarded.model[3].weight.register_hook(lambda gradient: gradient * 1e30)
    guarded.step(*batches(1)[0])
    assert guarded.watch.trouble(accelerator) is None


def test_gradients_that_no_loss_scale_helps_end_the_run(images, accelerator, monkeypatch):
    """As of a root at 0, under a loss that is finite. The scaler is torch's, on the CPU."""
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    settings = parse_config(config("natural", "batch", images, small=True), "test")
    learner = Learner(settings, accelerator, load_dataset(settings.data, "train"))
    weight = next(learner.net.bare.parameters())
    weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weight.detach().clone()
    meter, batches = Meter(accelerator.device), list(learner.loader.epoch(0))
    for step in range(40):
        if step == 20:
            learner.check_updates()  # so much may be the daily bread of fp16
        learner.learn(batches[step % len(batches)], meter)
    assert weight.equal(before)
    with pytest.raises(RunFailure, match="not finite at any loss scale"):
        learner.check_updates()
