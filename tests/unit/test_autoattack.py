"""AutoAttack against its authors' code, step by step: what each asks the network, and who falls.

Random numbers are given to the authors' code from ours, which draws them for each image by itself.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyautoattack.autopgd_base
import pyautoattack.fab_pt
import pyautoattack.square
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import forked
from attacked_by_ranks import judged, short, shorten
from colours import colours
from dist_adv import rng
from dist_adv.attacks.apgd import APGD, dlr_targeted, untargeted
from dist_adv.attacks.autoattack import AutoAttack
from dist_adv.attacks.fab import FAB
from dist_adv.attacks.parts import Parts
from dist_adv.attacks.pgd import frozen
from dist_adv.attacks.spec import ENSEMBLE
from dist_adv.attacks.square import Square, _signs
from dist_adv.attacks.threat import Threat, build
from dist_adv.config import EvalOptions
from dist_adv.data import Dataset
from dist_adv.errors import UserError
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.models import PreActResNet18Options, build_model

NORMS = {"linf": "Linf", "l2": "L2"}
BALLS = [("linf", 16 / 255), ("l2", 1.5)]


class Asked(nn.Module):
    """A network that keeps what it was asked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.images.append(x.detach().double().clone())
        return self.network(x.double()).to(x.dtype)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return colours(64, seed=1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Right about most, and robust to some of it; smooth, so that rounding is not magnified."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(8, 16, 3, stride=2)),
        *(nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 10)),
    )
    optimizer, many = torch.optim.Adam(net.parameters(), 3e-3), colours(800)
    for _ in range(8):
        for at in range(0, 800, 100):
            x, y = many.images[at : at + 100] / 255, many.labels[at : at + 100]
            x = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.double().eval()


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def batch(network: nn.Module, data: Dataset) -> Batch:
    """Images that are right, the surest first, their labels, likeliest other classes and keys."""
    x, y = data.images.double() / 255, data.labels
    logits = network(x)
    right = logits.argmax(1) == y
    assert right.sum() >= 40
    targets = logits.argsort(1, descending=True)[:, 1]
    keys = rng.sample_keys(7, torch.arange(len(y)))
    top = logits.topk(2, dim=1).values
    order = (top[:, 1] - top[:, 0]).where(right, torch.inf).argsort()[: right.sum()]
    return x[order], y[order], targets[order], keys[order]


def theirs_apgd(net: nn.Module, ball: Threat, loss: str, targets: Tensor, steps: int) -> Any:
    kind = pyautoattack.autopgd_base
    known = {"norm": NORMS[ball.norm], "eps": ball.eps, "n_iter": steps, "device": "cpu"}
    if loss == "ce":
        attack = kind.APGDAttack(net, loss="ce", **known)
    else:
        attack = kind.APGDAttack_targeted(net, **known)
        attack.y_target = targets
    return attack


@pytest.mark.parametrize("steps", [100, 50])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.6)])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_takes_the_authors_steps(
    loss: str,
    norm: str,
    eps: float,
    steps: int,
    network: nn.Module,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Halvings, returns to the best and momentum among them; of images that resist to the end."""
    ball, ours, theirs = build(norm, eps), Asked(network), Asked(network)
    search = APGD(ball, untargeted if loss == "ce" else dlr_targeted, steps)
    with frozen(ours):
        resist = ~search(network, *batch).fooled
        x, y, targets, keys = (each[resist][:16] for each in batch)
        found = search(ours, x, y, targets, keys)
    attack = theirs_apgd(theirs, ball, loss, targets, steps)
    attack.init_hyperparam(x)
    monkeypatch.setattr(torch, "zeros", partial(torch.zeros, dtype=x.dtype))  # of their losses
    attack.attack_single_run(x, y, x_init=ours.images[0])
    assert not found.fooled.any()
    assert len(x) > 10
    assert len(ours.images) == len(theirs.images) == steps + 1
    for mine, other in zip(ours.images, theirs.images, strict=True):
        # But for pixels of no gradient, whose sign is rounding's; theirs adds 1e-12 to norms.
        assert (mine - other).abs().flatten().quantile(0.99) < 1e-5 * eps
    assert ball.size(mine - x).max() > 0.9 * eps


@pytest.mark.parametrize(("norm", "eps"), BALLS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_fools_whom_the_authors_fools(
    loss: str, norm: str, eps: float, network: nn.Module, batch: Batch
) -> None:
    x, y, targets, keys = batch
    search = APGD(build(norm, eps), untargeted if loss == "ce" else dlr_targeted, 30)
    start, some = x + search._start(x, keys), 0
    for part in (0.4, 0.8):
        ball = build(norm, part * eps)
        with frozen(network):
            found = replace(search, threat=ball)(network, x, y, targets, keys)
        attack = theirs_apgd(network, ball, loss, targets, 30)
        attack.init_hyperparam(x)
        _, resists, _, _ = attack.attack_single_run(x, y, x_init=x + part * (start - x))
        assert (found.fooled ^ resists).sum() >= len(x) - 1
        some += int(found.fooled.sum())
        assert (network(found.images).argmax(1) == y).equal(~found.fooled)
        assert ball.size(found.images - x).max() <= ball.eps * (1 + 1e-6)
    assert 0 < some < 2 * len(x)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_takes_the_authors_steps(norm: str, network: nn.Module, batch: Batch) -> None:
    """Theirs rounds images to fp32, which its walk along the boundary magnifies in time."""
    x, y, targets, keys = batch
    x = x.float()
    ours, theirs = Asked(network), Asked(network)
    with frozen(network):
        found = FAB(build(norm, 1e-6), 12)(ours, x, y, targets, keys)
    attack = pyautoattack.fab_pt.FABAttack_PT(theirs, norm=NORMS[norm], n_iter=12, device="cpu")
    attack.target_class = 2
    attack.attack_single_run(x, y, is_targeted=True)
    assert not found.fooled.any()
    pairs = list(zip(ours.images, theirs.images[2:], strict=True))  # theirs looks twice before
    assert len(pairs) == 24
    for mine, other in pairs:
        assert (mine - other).flatten(1).abs().amax(1).quantile(0.9) < 2e-4
    assert (pairs[-1][0] - x).abs().max() > 1e-2


@pytest.mark.parametrize(("norm", "eps"), BALLS)
def test_fab_fools_whom_the_authors_fools(
    norm: str, eps: float, network: nn.Module, batch: Batch
) -> None:
    x, y, targets, keys = batch
    attack = pyautoattack.fab_pt.FABAttack_PT(
        Asked(network), norm=NORMS[norm], n_iter=30, device="cpu"
    )
    attack.target_class = 2
    nearest = attack.attack_single_run(x.float(), y, is_targeted=True).double()
    some = 0
    for part in (0.2, 0.4, 0.6, 1.0):
        ball = build(norm, part * eps)
        with frozen(network):
            found = FAB(ball, 30)(Asked(network), x.float(), y, targets, keys)
        expected = (ball.size(nearest - x).flatten() <= ball.eps) & (nearest != x).any((1, 2, 3))
        assert (found.fooled == expected).sum() >= len(x) - 1
        some += int(found.fooled.sum())
    assert 0 < some < 4 * len(x)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_to_the_hyperplane_is_the_shortest(norm: str) -> None:
    """Against the authors' projection, which sorts; where there is no room, as far as there is."""
    torch.manual_seed(0)
    at, gradient = torch.rand(40, 3, 5, 5).double(), torch.randn(40, 3, 5, 5).double()
    at[:10] = at[:10].round()  # in corners
    gradient[5:15] *= torch.rand(10, 3, 5, 5).double() < 0.3
    rise = torch.linspace(-40, 40, 40).double()
    ours = FAB(build(norm, 1.0))._to_plane(at, gradient, rise)
    level = (gradient * at).flatten(1).sum(1) + rise
    theirs = getattr(pyautoattack.fab_base, f"projection_{norm}")(
        at.flatten(1), gradient.flatten(1), level
    )
    assert torch.allclose(ours.flatten(1), theirs, atol=1e-5)
    assert (at + ours).min() >= 0
    assert (at + ours).max() <= 1
    reached = ((gradient * ours).flatten(1).sum(1) - rise).abs() < 1e-9
    assert 5 < reached.sum() < 40


def test_a_step_where_there_is_no_gradient_stays() -> None:
    for norm in NORMS:
        still = FAB(build(norm, 1.0))._to_plane(
            torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.tensor([1.0, 0.0])
        )
        assert (still == 0).all()


class Given(pyautoattack.square.SquareAttack):
    """The authors' Square with the random numbers of ours, of which images have the same."""

    def __init__(self, net: nn.Module, ours: Square, keys: Tensor, queries: int) -> None:
        ball = ours.threat
        known = {"norm": NORMS[ball.norm], "eps": ball.eps, "n_queries": queries}
        super().__init__(net, device="cpu", resc_schedule=False, **known)
        first = keys[:1]
        drawn = torch.cat([ours._draws(first, at, 3)[0] for at in range(0, queries, 250)])
        if ball.norm == "linf":
            stripes = rng.uniform(rng.substream(first, "stripes"), (3, 1, 32))
            self.signs = [stripes, *(row[5:, None, None] for row in drawn)]
            self.corners = [row[at] for row in drawn for at in (0, 1)]
            self.turns = []
        else:
            tiles = rng.uniform(rng.substream(first, "tiles"), (25, 4))[0]
            self.signs = [*(row[1:, None, None] for row in (*tiles, *drawn[:, 4:]))]
            self.corners = [row[at] for row in drawn for at in (0, 1, 2, 3)]
            self.turns = [*tiles[:, 0], *drawn[:, 4]]

    def random_choice(self, shape: list[int]) -> Tensor:
        return _signs(self.signs.pop(0)).expand(shape)

    def random_int(self, low: int = 0, high: int = 1, shape: Any = None) -> Tensor:
        return (self.corners.pop(0) * high).long()

    def eta(self, s: int) -> Tensor:
        drawn = self.turns.pop(0)
        upright = torch.cat([self.eta_rectangles(s // 2, s), -self.eta_rectangles(s - s // 2, s)])
        upright = upright / upright.norm()
        return upright.T if drawn > 0.5 else upright


def once(asked: list[Tensor]) -> list[Tensor]:
    """What was asked, without what was asked before: ours asks nothing twice in a row."""
    kept: list[Tensor] = []
    for each in asked:
        if not any((each - other).abs().max() < 1e-6 for other in kept):
            kept.append(each)
    return kept


@pytest.mark.parametrize(("norm", "eps"), [("linf", 4 / 255), ("l2", 0.5)])
def test_square_proposes_the_authors_squares(
    norm: str, eps: float, network: nn.Module, batch: Batch
) -> None:
    """The first image for 300 queries, of five sizes of squares."""
    x, y, targets, keys = (each[:1] for each in batch)
    ours, theirs = Asked(network), Asked(network)
    search = Square(build(norm, eps), 300)
    with frozen(network):
        found = search(ours, x, y, targets, keys)
    given = Given(theirs, search, keys, 300)
    given.init_hyperparam(x)
    given.attack_single_run(x, y)
    assert not found.fooled.any()
    mine, other = once(ours.images), once(theirs.images)
    assert len(mine) == len(other) > 250
    assert max((one - two).abs().max() for one, two in zip(mine, other, strict=True)) < 1e-5


@pytest.mark.parametrize(("norm", "eps"), BALLS)
def test_square_fools_whom_the_authors_fools(
    norm: str, eps: float, network: nn.Module, batch: Batch
) -> None:
    x, y, targets, keys = batch
    keys, some = keys[:1].expand_as(keys), 0
    for part in (0.5, 1.0):
        search = Square(build(norm, part * eps), 100)
        with frozen(network):
            found = search(network, x, y, targets, keys)
        given = Given(Asked(network), search, keys, 100)
        given.init_hyperparam(x)
        _, images = given.attack_single_run(x, y)
        resists = network(images.double()).argmax(1) == y
        assert (found.fooled ^ resists).sum() >= len(x) - 1
        some += int(found.fooled.sum())
    assert 0 < some < 2 * len(x)


@pytest.mark.parametrize("query", [0, 10, 11, 201, 4001, 4999])
@pytest.mark.parametrize("norm", NORMS)
def test_squares_have_the_authors_sizes(norm: str, query: int) -> None:
    for side in (8, 28, 32, 224):
        theirs = pyautoattack.square.SquareAttack(len, p_init=0.8, eps=1.0, resc_schedule=False)
        size = round(math.sqrt(theirs.p_selection(query) * side * side))
        if norm == "l2":
            size = max(size, 3) + (max(size, 3) % 2 == 0)
        size = min(max(size, 1), side)
        assert Square(build(norm, 1.0))._size(query, torch.Size([side, side])) == size


def test_images_of_one_pixel_and_of_unequal_sides(network: nn.Module) -> None:
    for shape in [(1, 1), (3, 2), (5, 9)]:
        x, y = torch.rand(4, 3, *shape).double(), torch.tensor([0, 1, 2, 3])
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).double()
        with frozen(net):
            for norm, eps in BALLS:
                y = net(x).argmax(1)
                found = Square(build(norm, eps), 20)(net, x, y, y, torch.arange(4))
                assert found.images.isfinite().all()
                assert build(norm, eps).size(found.images - x).max() <= eps + 1e-6


# --- the ensemble --------------------------------------------------------------------------------


@pytest.fixture
def brief() -> Iterator[None]:
    with short(steps=3, queries=20):
        yield


ALL_FOUR = [*ENSEMBLE]


@pytest.mark.parametrize(
    ("classes", "norm", "version", "attacks", "targets"),
    [
        (2, "l2", "custom", ["apgd-ce", "fab-t", "square"], 1),
        (3, "linf", "custom", ["apgd-ce", "fab-t", "square"], 2),
        (4, "l2", "custom", ALL_FOUR, 3),
        (9, "linf", "custom", ALL_FOUR, 8),
        (10, "l2", "standard", ALL_FOUR, 9),
        (11, "linf", "standard", ALL_FOUR, 9),
    ],
)
@pytest.mark.usefixtures("brief")
def test_autoattack_has_the_attacks_that_there_are(
    classes: int,
    norm: str,
    version: str,
    attacks: list[str],
    targets: int,
    accelerator: Accelerator,
) -> None:
    """Nothing falls within so small a ball, so every attack gets images."""
    data = colours(2, classes)
    net = build_model(PreActResNet18Options(width=2), [0.5] * 3, [0.25] * 3, data.classes, 0).eval()
    with torch.no_grad():  # whatever it says is right
        data = replace(data, labels=net(data.images.float() / 255).argmax(1))
    (result,), examples = evaluate(
        net, data, build(norm, 1e-4), EvalOptions(attacks=["autoattack"]), accelerator
    )
    assert (result.correct, result.n) == (2, 2)
    wanted = {"version": version, "attacks": attacks, "target_classes": targets}
    assert result.settings.items() >= wanted.items()
    left_out = [flag for flag in result.flags if "APGD-T is left out" in flag]
    assert bool(left_out) == ("apgd-t" not in attacks)
    assert examples is not None
    assert (examples.adversarial - examples.clean).abs().max() == 0
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_autoattack_needs_two_classes() -> None:
    with pytest.raises(UserError, match="autoattack: it and its parts need two classes"):
        AutoAttack(nn.Flatten(), build("linf", 0.1), 1)


def test_targeted_apgd_alone_needs_four_classes() -> None:
    with pytest.raises(UserError, match="apgd-t: needs four classes or more; this model has 3"):
        AutoAttack(nn.Flatten(), build("linf", 0.1), 3, ["apgd-t"])


@pytest.mark.usefixtures("brief")
def test_each_of_the_four_is_an_attack_by_itself(
    network: nn.Module, data: Dataset, accelerator: Accelerator
) -> None:
    """On all images that are right, with the random numbers that it has in the ensemble."""
    ball, net = build("linf", 0.02), Asked(network)
    options = EvalOptions(attacks=["natural", *ENSEMBLE])
    (_, *results), _ = evaluate(net, data, ball, options, accelerator)
    x, y = data.images.float() / 255, data.labels
    right = net(x).argmax(1) == y
    keys = rng.sample_keys(rng.stream_key(0, "attack"), torch.arange(len(y)))
    for name, result in zip(ENSEMBLE, results, strict=True):
        *_, left = AutoAttack(net, ball, 10, [name])(x[right], y[right], keys[right])
        assert (result.attack, result.correct) == (name, len(left.x))
        assert result.settings["attacks"] == [name]
    assert len({result.correct for result in results}) > 1


@pytest.mark.usefixtures("brief")
def test_a_figure_does_not_depend_on_the_batches(
    network: nn.Module, data: Dataset, accelerator: Accelerator
) -> None:
    """Nor on which images are beside an image: its random numbers are its own."""
    figures = set()
    for size in (64, 7):
        options = EvalOptions(attacks=["natural", "autoattack"], batch_size=size)
        net = Asked(network)
        (natural, result), _ = evaluate(net, data, build("linf", 0.02), options, accelerator)
        assert 0 < result.correct < natural.correct
        figures.add((result.correct, result.loss))
    assert len({correct for correct, _ in figures}) == 1
    losses = [loss for _, loss in figures]
    assert max(losses) - min(losses) < 1e-6


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_figure_does_not_depend_on_the_ranks(
    ranks: int, tmp_path: Path, accelerator: Accelerator
) -> None:
    """They share out anew what is left before each attack, though a rank may have no image."""
    program = Path(__file__).parents[1] / "support" / "attacked_by_ranks.py"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = forked.run(
        [sys.executable, *command, str(program), str(tmp_path / "found.json")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, expected = json.loads((tmp_path / "found.json").read_text()), judged(accelerator, 500)
    assert 0 < expected["correct"] < expected["natural"]
    assert abs(found.pop("loss") - expected.pop("loss")) < 1e-6
    assert found.pop("all fall") == 0  # then there is nothing to share out
    shares = zip(*found.pop("shares"), strict=True)
    assert all(max(each) - min(each) <= 1 for each in shares)
    expected.pop("shares")
    assert found == expected


def test_each_image_ends_once(network: nn.Module, batch: Batch) -> None:
    """Fallen ones are within the ball and wrong, the others as they came."""
    x, y, _, keys = batch
    attack = AutoAttack(network, build("linf", 0.04), 10)
    shorten(attack, steps=2, queries=50)
    attack.searches["apgd-ce"] = (APGD(build("linf", 0.01), untargeted, 1), 0)
    ended = attack(x, y, keys)
    assert [each.attack for each in ended] == [*ENSEMBLE, ""]
    assert sorted(torch.cat([each.keys for each in ended]).tolist()) == sorted(keys.tolist())
    for each in ended:
        wrong = network(each.images).argmax(1) != each.y
        assert wrong.all() if each.attack else not wrong.any()
        if len(each.x):
            assert (each.images - each.x).abs().max() <= 0.04 + 1e-9
    assert len(ended[0].x) > 0
    assert len(ended[1].x) > 0
    assert len(ended[-1].x) > 0


def test_the_whole_ensemble_leaves_as_many_as_the_authors(network: nn.Module, batch: Batch) -> None:
    """With other random numbers; 10 steps and 100 queries each."""
    x, y, _, keys = batch
    attack = AutoAttack(network, build("linf", 0.03), 10)
    shorten(attack, steps=10, queries=100)
    known = {"norm": "Linf", "eps": 0.03, "seed": 0, "device": "cpu"}
    theirs = pyautoattack.AutoAttack(Asked(network), **known)
    for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
        part.n_iter = 10
    theirs.square.n_queries = 100
    images, _ = theirs.run_standard_evaluation(x.float(), y, batch_size=len(x))
    left = int((network(images.double()).argmax(1) == y).sum())
    ours = len(attack(x, y, keys)[-1].x)
    assert 3 < left < len(x) - 3
    assert abs(ours - left) <= 1


def test_parts_are_halved_until_they_fit() -> None:
    """The GPU is pretended: a network that has memory for five images."""
    parts, sizes = Parts(), list[int]()

    def work(x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 5:
            raise torch.OutOfMemoryError("pretended")
        return x + y

    rows = torch.arange(22), torch.arange(22)
    assert torch.cat(parts(work, *rows)).tolist() == list(range(0, 44, 2))
    assert sizes == [22, 11, 5, 5, 5, 5, 2]
    assert torch.cat(parts(work, *rows)).tolist() == list(range(0, 44, 2))
    assert sizes[7:] == [5, 5, 5, 5, 2]  # it remembers

    def never(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("pretended")

    with pytest.raises(torch.OutOfMemoryError):
        parts(never, rows[0])
