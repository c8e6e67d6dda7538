"""The geometry of the two balls: steps, projections and random points."""

import math

import eagerpy as ep
import foolbox
import pytest
import torch
from scipy import stats

from dist_adv import rng
from dist_adv.attacks.threat import L2, Linf, build

UNLIKELY = 1e-4
EPS = 0.3
BALLS = [Linf(EPS), L2(EPS)]
RADII = {"linf": lambda v: v.flatten(1).abs().amax(1), "l2": lambda v: v.flatten(1).norm(dim=1)}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images() -> torch.Tensor:
    """Some pixels are black, some white, the others anything between."""
    return (drawn(50, 3, 4, 4, seed=1) * 0.6 + 0.5).clamp(0, 1)


def keys(n: int) -> torch.Tensor:
    return rng.sample_keys(rng.stream_key(0, "threat"), torch.arange(n))


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("size", [1e-6, 0.05, 1, 1e6])
def test_projection_is_into_ball_and_pixels(ball, size):
    x = images()
    delta = ball.project(drawn(*x.shape) * size, x)
    assert (RADII[ball.norm](delta) <= EPS * (1 + 1e-6)).all()
    assert (x + delta).min() >= 0
    assert (x + delta).max() <= 1


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("size", [0.05, 1])
def test_projection_is_idempotent(ball, size):
    x = images()
    once = ball.project(drawn(*x.shape) * size, x)
    torch.testing.assert_close(ball.project(once, x), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ball", BALLS)
def test_points_inside_stay_where_they_are(ball):
    x = torch.full((50, 3, 4, 4), 0.5)
    inside = drawn(*x.shape) * 0.01
    assert ball.project(inside, x).equal(inside)


def test_linf_projection_is_a_clamp():
    """To the box that is the cube cut with the valid pixels."""
    x, delta = images(), drawn(50, 3, 4, 4)
    expected = torch.minimum(torch.maximum(delta, (-x).clamp_min(-EPS)), (1 - x).clamp_max(EPS))
    assert Linf(EPS).project(delta, x).equal(expected)


def test_l2_projection_is_radial():
    x, delta = torch.full((50, 3, 4, 4), 0.5), drawn(50, 3, 4, 4)
    for scale in (0.01, 1, 100):
        v = delta * scale
        expected = torch.stack([each * min(1, EPS / each.norm().item()) for each in v])
        torch.testing.assert_close(L2(EPS).project(v, x), expected)


def test_linf_random_is_uniform():
    start = Linf(EPS).random(keys(500), torch.Size((500, 3, 4, 4)))
    assert stats.kstest(start.flatten().numpy(), stats.uniform(-EPS, 2 * EPS).cdf).pvalue > UNLIKELY


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 1, 3), (3, 2, 2)])
def test_l2_random_is_uniform_in_the_ball(shape):
    """Of points that are uniform in a d-ball, (radius / eps)^d is uniform."""
    start = L2(EPS).random(keys(5000), torch.Size((5000, *shape)))
    radius = RADII["l2"](start)
    assert (radius <= EPS * (1 + 1e-6)).all()
    share = (radius.double() / EPS) ** math.prod(shape)
    assert stats.kstest(share.numpy(), stats.uniform.cdf).pvalue > UNLIKELY


def test_l2_random_prefers_no_direction():
    """In the plane all angles are alike, within each quarter too; the radius does not tell them."""
    points = L2(EPS).random(keys(5000), torch.Size((5000, 1, 1, 2))).flatten(1)
    turn = torch.atan2(points[:, 1], points[:, 0]) / (2 * math.pi) + 0.5
    for angle in (turn, (4 * turn) % 1):
        assert stats.kstest(angle.numpy(), stats.uniform.cdf).pvalue > UNLIKELY
    radius = points.norm(dim=1)
    together = torch.stack([radius, turn, *(points / radius[:, None]).T])
    assert torch.corrcoef(together)[0, 1:].abs().max() < 4 / 5000**0.5


@pytest.mark.parametrize("ball", BALLS)
def test_random_start_belongs_to_the_sample(ball):
    """Whichever ranks the samples are on."""
    whole = ball.random(keys(40), torch.Size((40, 3, 4, 4)))
    mine = torch.arange(1, 40, 3)
    part = ball.random(keys(40)[mine], torch.Size((len(mine), 3, 4, 4)))
    torch.testing.assert_close(part, whole[mine], rtol=1e-6, atol=0)


@pytest.mark.parametrize("ball", BALLS)
def test_around_is_project(ball):
    """Bit for bit, for one perturbation after the other."""
    x, project = images(), ball.around(images())
    for seed in (1, 2):
        delta = drawn(*x.shape, seed=seed)
        assert project(delta).equal(ball.project(delta, x))


def test_linf_is_cut_to_the_ball_and_then_to_the_pixels():
    """Bit for bit as in two plain steps, in images of real pixels."""
    x = torch.arange(256).repeat(50, 1).view(50, 1, 16, 16) / 255
    delta = drawn(*x.shape) * EPS
    cut = torch.max(torch.min(delta.clamp(-EPS, EPS), 1 - x), -x)
    assert Linf(EPS).project(delta, x).equal(cut)


def test_linf_step():
    delta, gradient = drawn(50, 3, 4, 4), drawn(50, 3, 4, 4, seed=2)
    moved = Linf(EPS).ascend(delta, gradient, 0.1) - delta
    torch.testing.assert_close(moved, torch.where(gradient > 0, 0.1, -0.1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "scale", [1e-20, 1e-13, 1e-6, 1, 1e15, 1e30, torch.logspace(-25, 25, 50).view(-1, 1, 1, 1)]
)
def test_l2_step_is_of_full_length_along_the_gradient(scale):
    """Also where the loss is nearly saturated, and where squares leave the range of floats."""
    gradient = drawn(50, 3, 4, 4)
    moved = L2(EPS).ascend(torch.zeros_like(gradient), gradient * scale, 0.1)
    expected = 0.1 * gradient / RADII["l2"](gradient).view(-1, 1, 1, 1)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ball", BALLS)
def test_no_gradient_no_step(ball):
    delta = drawn(2, 3, 4, 4)
    assert ball.ascend(delta, torch.zeros_like(delta), 0.1).equal(delta)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("ball", "gradient", "step"),
    [
        (Linf(EPS), [NAN, 2, -3, 0], [0, 1, -1, 0]),
        (Linf(EPS), [INF, -INF, 1, NAN], [1, -1, 1, 0]),
        (L2(EPS), [NAN, 3, -4, 0], [0, 0.6, -0.8, 0]),
        (L2(EPS), [NAN, NAN, NAN, NAN], [0, 0, 0, 0]),
        (L2(EPS), [INF, 1, -2, 3], [1, 0, 0, 0]),
        (L2(EPS), [INF, -INF, 1, NAN], [0.5**0.5, -(0.5**0.5), 0, 0]),
    ],
)
def test_overflowed_gradient(ball, gradient, step):
    """NaN counts as 0 and inf as very large: one bad component spoils no step.

    Of many images, so that a CPU's vector units have a share of them.
    """
    delta = torch.zeros(33, 1, 2, 2)
    moved = ball.ascend(delta, torch.tensor(gradient).view(1, 1, 2, 2).expand(delta.shape), 0.1)
    expected = 0.1 * torch.tensor(step).expand(33, 4)
    torch.testing.assert_close(moved.flatten(1), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radius_zero(norm):
    ball, x = build(norm, 0.0), images()
    assert ball.norm == norm
    assert not ball.random(keys(50), x.shape).any()
    assert not ball.project(drawn(*x.shape), x).any()


@pytest.mark.parametrize(
    ("ball", "judge"), [(Linf(EPS), foolbox.attacks.LinfPGD()), (L2(EPS), foolbox.attacks.L2PGD())]
)
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_one_step_is_foolbox_s(ball, judge, scale):
    x, delta = images(), ball.project(drawn(50, 3, 4, 4) * 0.2, images())
    gradient = drawn(50, 3, 4, 4, seed=2) * scale
    ours = x + ball.project(ball.ascend(delta, gradient, 0.1), x)
    x0 = ep.astensor(x)
    direction = judge.normalize(ep.astensor(gradient), x=x0, bounds=(0, 1))
    theirs = judge.project(ep.astensor(x + delta) + 0.1 * direction, x0, EPS).clip(0, 1)
    torch.testing.assert_close(ours, theirs.raw, rtol=0, atol=1e-6)
