"""What methods are made of, against closed forms; whole runs are in tests/parity."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dist_adv.attacks import frozen
from dist_adv.attacks.threat import Linf
from dist_adv.config import parse_config
from dist_adv.data import Batch, Dataset, When
from dist_adv.errors import UserError
from dist_adv.methods import Method, Task, build_method
from dist_adv.methods.aaer import AAER
from dist_adv.methods.description import settings
from dist_adv.methods.liet import LIET
from dist_adv.methods.nuat import NuAT
from dist_adv.methods.registry import own_methods
from dist_adv.training import run
from dist_adv.training.learner import Learner

SHAPE = torch.Size((1, 3, 3))


class Network(nn.Module):
    """Two classes whose logits are -s and s, s = w.x: its loss is nearly straight.

    waves: s goes up and down so often instead that no step keeps to a slope.
    """

    def __init__(self, waves: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(1e-3 * torch.linspace(-1, 1.5, SHAPE.numel()))
        self.waves = waves

    def forward(self, x: Tensor) -> Tensor:
        s = x.flatten(1) @ self.w
        s = torch.sin(self.waves * s) if self.waves else s
        return torch.stack([-s, s], 1)


class Net:
    """A network as methods see it, on one rank."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)

    def frozen(self, mode: Literal["train", "eval"] = "train") -> Any:
        return frozen(self.model, eval_mode=mode == "eval")

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return value.detach()


def method(name: str, **options: Any) -> Method[Any]:
    tree = {"method": {"name": name, **options}, "average": {"epochs": 1}}
    task = Task(F.cross_entropy, samples=6, shape=SHAPE, classes=2, device=torch.device("cpu"))
    return build_method(parse_config(tree, "test").method, task)


def batch(epoch: int = 0, number: int = 0) -> Batch:
    samples = torch.arange(4)
    return Batch(
        torch.full((4, *SHAPE), 0.5),
        torch.tensor([0, 0, 0, 1]),
        samples,
        samples + 100 * epoch + number,
        total=4,
        weight=1.0,
        when=When(epoch, number, 2, key=7 + number),
    )


def learn(it: Method[Any], net: Net, given: Batch, scale: float = 1.0) -> None:
    for objective in it.steps(net, given, Linf(0.1)):
        (scale * objective().loss).backward()


@pytest.mark.parametrize(
    "name", [each for each, kind in own_methods().items() if len(kind.norms) < 2]
)
def test_methods_of_signs_are_refused_for_l2(name: str) -> None:
    tree = {"method": {"name": name}, "threat": {"norm": "l2", "eps": 0.5}}
    with pytest.raises(UserError, match=rf"threat\.norm: {name} is made for linf, not for l2"):
        parse_config(tree, "test")


@pytest.mark.parametrize("spoilt", [0.0, math.nan, 3e38])
def test_perturbations_a_class_outlive_a_batch_without_a_gradient(spoilt: float) -> None:
    """Also one that is too large to be added up: what was there stays, and goes on."""
    it, net = method("consistency"), Net(Network())
    learn(it, net, batch())
    before = [each.value.clone() for each in it.carried().values()]
    it.start.learn(net, batch(0, 1), torch.nan_to_num(torch.full((4, *SHAPE), spoilt)))
    assert all(map(torch.equal, (each.value for each in it.carried().values()), before))
    learn(it, net, batch(0, 2))
    assert not it.start.momentum.value.equal(before[1])


def test_a_perturbation_a_class_follows_its_momentum() -> None:
    """The gradient of a class's loss has one sign a pixel here, and so has its momentum."""
    it = method("consistency")
    net = Net(Network())
    learn(it, net, batch())
    for number in range(1, 3):
        learn(it, net, batch(0, number))
    rising = net.model.w.detach().sign().view(SHAPE)  # of the loss of class 0
    torch.testing.assert_close(it.start.signs.value, torch.stack([rising, -rising]))


def test_a_class_that_is_absent_keeps_its_perturbation() -> None:
    it = method("consistency")
    net = Net(Network())
    learn(it, net, batch())
    before = it.start.signs.value.clone(), it.start.momentum.value.clone()
    given = batch(0, 1)
    learn(it, net, replace(given, y=torch.zeros_like(given.y)))
    assert torch.equal(it.start.signs.value[1], before[0][1])
    assert torch.equal(it.start.momentum.value[1], before[1][1])
    assert not torch.equal(it.start.momentum.value[0], before[1][0])


def test_perturbations_an_image_are_drawn_anew_every_forty_epochs() -> None:
    it = method("consistency", start="prior")
    net = Net(Network())

    def start(epoch: int) -> Tensor:
        return it.start.begin(net, batch(epoch), Linf(0.1))

    learn(it, net, batch())
    assert torch.equal(start(1), start(39))
    assert not torch.equal(start(1), start(40))
    assert not torch.equal(start(0), start(40))
    assert start(40).unique().tolist() == pytest.approx([-0.1, 0.1])
    assert [each.rows.dtype for each in it.carried().values()] == [torch.int8, torch.float16]
    assert it.carried()["signs"].rows[4:].any().item() is False  # samples that never came


def test_perturbations_an_image_follow_their_momentum() -> None:
    """m_i = g_i / mean |g_i| + 0.3 m_i, which is 0 at first; d_i = clip(d_i + sign(m_i))."""
    it = method("consistency", start="prior")
    signs, momentum = (
        it.start.begin(Net(Network()), batch(), Linf(1.0)).sign(),
        torch.zeros(4, *SHAPE),
    )
    for epoch in range(5):
        gradient = torch.randn(4, *SHAPE) * torch.tensor([1.0, 100, 0.01, 1]).view(4, 1, 1, 1)
        given = batch(epoch)
        expected = 0.1 * signs
        torch.testing.assert_close(it.start.begin(Net(Network()), given, Linf(0.1)), expected)
        it.start.learn(Net(Network()), given, gradient)
        size = gradient.abs().mean((1, 2, 3), keepdim=True)
        momentum = gradient / size + 0.3 * momentum
        signs = (signs + momentum.sign()).clamp(-1, 1)


def test_a_gradient_that_is_not_finite_is_not_remembered() -> None:
    for start in ("cuap", "prior"):
        it = method("consistency", start=start)
        given = batch()
        bad = given.x.clone()
        bad[0] = torch.nan
        learn(it, Net(Network()), replace(given, x=bad))
        for each in it.carried().values():
            values = each.rows if start == "prior" else each.value
            assert values.isfinite().all(), start


def test_examples_are_what_the_network_expects_of_a_label_alone() -> None:
    """Made anew every few batches; a pixel is hidden as often as the batch's share says."""

    class Fickle(Network):
        """Says the opposite in train mode."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(1) if self.training else super().forward(x)

    it = method("liet", smoothing=0.2, refresh=2, hidden=[0.2, 0.4])
    net = Net(Fickle())
    rising = net.model.w.detach().sign().view(SHAPE)  # of the loss of class 0
    shares = []
    for number in range(200):
        given = batch(0, number)
        start = it.start.begin(net, given, Linf(0.1))
        torch.testing.assert_close(it.start.signs.value, torch.stack([rising, -rising]))
        shown = torch.stack([(start.abs() == 0.1)[i] for i in range(4)])
        sides = (start / 0.1 * it.start.signs.value[given.y])[shown]
        assert sides.unique().numel() == 1  # 1 or -1, the batch's
        shares.append(1 - shown.float().mean().item())
        if number == 2:  # made at batch 2 and kept at batch 3
            net.model.w.data.neg_()
            start = it.start.begin(net, batch(0, 3), Linf(0.1))
            assert torch.equal(it.start.signs.value[0], rising)
            net.model.w.data.neg_()
    assert sum(shares) / 200 == pytest.approx(0.3, abs=0.02)
    assert start.abs().max() <= 0.1


def test_examples_under_larger_noise_have_no_ball() -> None:
    it = method("liet", smoothing=0.2, noise=2, hidden=[1, 1])
    given = batch()
    start = it.start.begin(Net(Network()), given, Linf(0.1))
    assert 0.1 < start.abs().max() <= 0.2
    flat = torch.zeros_like(start)
    assert torch.equal(
        it.start.step(3 * start, flat, given, Linf(0.1)), (3 * start).clamp(-0.5, 0.5)
    )
    tight = method("liet", smoothing=0.2).start
    assert tight.step(3 * start, flat, given, Linf(0.1)).abs().max() <= 0.1


def test_labels_are_spread_at_random_and_anew() -> None:
    it = _liet()
    before, after = it.target(batch(), "before"), it.target(batch(), "after")
    for target in (before, after):
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        torch.testing.assert_close(target.gather(1, batch().y[:, None]), torch.full((4, 1), 0.4))
    assert not torch.allclose(before, after, atol=1e-3)


def test_a_label_is_not_spread_until_another_is_likelier() -> None:
    with pytest.raises(UserError, match=r"method\.smoothing: 0\.6 .* 2 classes .* less than 0\.5"):
        method("liet")


def test_the_divergence_of_probabilities_that_are_far_apart_is_finite() -> None:
    """log 2 at most; where a probability is 0 in this precision, too."""
    apart = torch.tensor([[0.0, 1000.0, -1000.0]], requires_grad=True)
    found = LIET.distance(_liet(), torch.tensor([[1000.0, 0.0, -1000.0]]), apart)
    assert found.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(found, apart)[0].isfinite().all()
    one, other = torch.randn(7, 3), torch.randn(7, 3)
    p, q = one.softmax(1), other.softmax(1)
    middle = (p + q) / 2
    expected = ((p * (p / middle).log() + q * (q / middle).log()) / 2).sum(1).mean()
    torch.testing.assert_close(LIET.distance(_liet(), one, other), expected)


def _liet() -> LIET:
    return LIET(LIET.Options(), Task(F.cross_entropy, 6, SHAPE, 3, torch.device("cpu")))


def test_the_linearity_is_1_where_the_loss_is_straight() -> None:
    """Whatever the engine multiplies a loss by: a rank's share, fp16's scale."""
    found = {}
    for waves in (0.0, 1e5):
        for scale in (1.0, 1024.0):
            it = method("sora")
            for number in range(3):
                learn(it, Net(Network(waves)), batch(0, number), scale)
            found[waves, scale] = it.linearity.value.item()
    assert found[0.0, 1.0] == pytest.approx(1 - 0.01 * 0.95**3, abs=2e-4)
    assert found[1e5, 1.0] < 0.98
    for waves in (0.0, 1e5):
        assert found[waves, 1.0] == pytest.approx(found[waves, 1024.0], abs=1e-6)


def test_the_nuclear_norm_is_that_of_singular_values() -> None:
    """Also of a batch smaller than the classes, on two ranks, and of nothing at all."""
    for rows in (2, 5, 33):
        clean, moved = torch.randn(rows, 10), torch.randn(rows, 10, requires_grad=True)
        norm = torch.linalg.matrix_norm(clean - moved, "nuc")
        (expected,) = torch.autograd.grad(norm, moved)
        whole = (clean - moved).detach().double()
        told = whole.T @ whole
        net = SimpleNamespace(sum_over_ranks=lambda own, told=told: told)
        total, gradient = torch.tensor(0.0), torch.zeros_like(moved)
        for mine in (slice(0, rows // 2), slice(rows // 2, rows)):
            of_each = NuAT.distance(_nuat(2), net, clean[mine], moved[mine])
            total = total + of_each.sum()
            gradient += torch.autograd.grad(of_each.sum(), moved)[0]
        torch.testing.assert_close(total, norm, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    same = torch.randn(4, 10)
    assert NuAT.distance(_nuat(2), Net(nn.Identity()), same, same).tolist() == [0.0] * 4


def _nuat(classes: int) -> NuAT:
    task = Task(F.cross_entropy, 6, SHAPE, classes, torch.device("cpu"))
    return NuAT(NuAT.Options(), task)


def test_logits_that_are_not_finite_are_the_loss_s_to_tell() -> None:
    """LAPACK raises for a matrix with NaN; the run's own message names step and rank."""
    clean, adversarial = torch.randn(2, 8, 10)
    clean[3, 4] = math.nan
    assert _nuat(10).distance(Net(Network()), clean, adversarial).isnan().any()


def test_gat_is_stronger_after_epoch_86_of_100() -> None:
    it = method("gat", strength=3)
    shares = 0.0, 0.85, 0.8599, 0.86, 0.99
    assert [it.strength(When(0, 0, 1, 0, progress=at)) for at in shares] == [3, 3, 3, 12, 12]


def test_nuat_says_where_it_fails() -> None:
    assert _nuat(10).caution == ""
    assert "14.4 % under AutoAttack" in _nuat(100).caution


@pytest.fixture
def announced(
    said: pytest.LogCaptureFixture, accelerator: Accelerator, digits: Dataset
) -> Callable[..., str]:
    """Return what a run of a method begins with."""

    def announce(caution: str = "", **options: Any) -> str:
        tree = {"method": options, "model": {"name": "preact_resnet18", "width": 4}}
        config = parse_config(tree, "test")
        learner = Learner(config, accelerator, digits)
        learner.method.caution = caution
        trainer = SimpleNamespace(config=config, accelerator=accelerator, learner=learner)
        run._announce("x", trainer, "fp32")
        return said.text

    return announce


def test_a_caution_is_told_when_a_run_begins(announced: Callable[..., str]) -> None:
    assert "method.name: beware" in announced("beware", name="nuat")


def test_the_size_of_tables_is_told_when_a_run_begins(
    announced: Callable[..., str], digits: Dataset
) -> None:
    """A byte and two of a number a value of every training image."""
    size = 3 * len(digits) * digits.images[0].numel() / 1e6
    text = announced(name="consistency", start="prior")
    assert f"its rows a training image take {size:.1f} MB on every rank and in checkpoints" in text


def test_nothing_is_told_of_tables_where_there_are_none(announced: Callable[..., str]) -> None:
    assert "rows a training image" not in announced(name="consistency", start="cuap")


def test_the_penalty_counts_over_all_ranks() -> None:
    """Of two ranks' shares, weighted as the engine does, against the formula on the whole."""
    abnormal = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    moved = torch.tensor([3.0, 1.0, 5.0, 2.0, 0.0], requires_grad=True)
    expected = 2 / 5 * (4 - 1)
    told = torch.tensor([2.0, 3.0, 8.0, 3.0])
    net = SimpleNamespace(sum_over_ranks=lambda own: told)
    found = torch.tensor(0.0)
    for mine in (slice(0, 2), slice(2, 5)):
        share = SimpleNamespace(total=5)
        penalty, of_all = AAER._penalty(net, share, abnormal[mine], moved[mine])
        found = found + penalty * len(abnormal[mine]) / 5
        assert of_all.item() == pytest.approx(0.4)
    assert found.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(found, moved)
    torch.testing.assert_close(gradient, abnormal / 5)


@pytest.mark.parametrize("abnormal", [torch.zeros(3), torch.ones(3)])
def test_without_two_kinds_there_is_no_penalty(abnormal: Tensor) -> None:
    net = Net(nn.Identity())
    penalty, _ = AAER._penalty(net, SimpleNamespace(total=3), abnormal, torch.rand(3))
    assert penalty.item() == 0


@pytest.mark.parametrize("name", ["pgd", "fast"])
def test_a_report_says_of_an_attack_that_it_is_in_eval_mode(name):
    usual, other = (
        settings(parse_config({"method": {"name": name, **more}}, "test").method)
        for more in ({}, {"attack_mode": "eval"})
    )
    assert other == f"{usual}, attack in eval mode"


@pytest.mark.parametrize("name", own_methods())
def test_a_network_that_is_sure_has_gradients(name: str) -> None:
    """Logits 120 apart: fp32 has no probability so small as that of the other class."""
    it = method(name, **({"smoothing": 0.3} if name == "liet" else {}))  # of two classes
    net = Net(Network())
    net.averaged = net.model
    with torch.no_grad():
        net.model.w *= 60 / net.model(torch.full((1, *SHAPE), 0.5))[0, 1]
    for number in range(2):  # of gat and nuat every other batch is attacked in another way
        learn(it, net, batch(0, number))
    assert net.model.w.grad is not None
    assert net.model.w.grad.isfinite().all()
