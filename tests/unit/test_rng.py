"""Random numbers are SplitMix64's, uniform, independent, and the same whoever asks."""

from itertools import islice

import pytest
import torch
from scipy import stats

from dist_adv import rng

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
UNLIKELY = 1e-4
"""The draws are fixed, so a test either always passes or always fails."""


def splitmix64(state: int):
    """Steele, Lea and Flood (2014), in Python's unbounded integers."""
    while True:
        state = (state + GOLDEN) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def keys_for(name: str, samples: int | torch.Tensor = 4000, step: int = 0) -> torch.Tensor:
    if isinstance(samples, int):
        samples = torch.arange(samples)
    return rng.sample_keys(rng.stream_key(0, name, step), samples)


def ks(values: torch.Tensor, distribution) -> float:
    return stats.kstest(values.double().numpy(), distribution.cdf).pvalue


def test_reference_is_splitmix64():
    """The first numbers of seed 1234567, as published with many implementations of it."""
    assert list(islice(splitmix64(1234567), 5)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


STATES = [0, 1, -1, 1234567, 2**63 - 1, -(2**63), -GOLDEN // 2, 0x0123456789ABCDEF]


def test_bits_and_uniform_are_splitmix64():
    """A sample's numbers are the generator's from its key on; uniform is the top 24 bits."""
    ours = rng.bits(torch.tensor(STATES), (3, 5))
    uniform = rng.uniform(torch.tensor(STATES), (3, 5))
    assert uniform.dtype == torch.float32
    for row, floats, state in zip(ours, uniform, STATES, strict=True):
        expected = list(islice(splitmix64(state & MASK), 15))
        assert [number & MASK for number in row.flatten().tolist()] == expected
        assert floats.flatten().tolist() == [(number >> 40) / 2**24 for number in expected]


@pytest.mark.parametrize("state", STATES)
def test_sample_keys_are_splitmix64(state):
    """Sample s has number s of the generator that starts at the stream's key."""
    expected = list(islice(splitmix64((state - GOLDEN) & MASK), 1001))
    samples = torch.tensor([0, 1, 2, 999, 1000])
    ours = rng.sample_keys(state, samples)
    assert [key & MASK for key in ours.tolist()] == [expected[sample] for sample in samples]


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1.0, 16 / 255, 0.2, 2.0])
def test_wider_uniform_is_a_product_in_float32(width, default):
    """Rounded once, as the numbers of [0, 1) times a float32; whatever torch's default is."""
    ours, numbers = keys_for("wide", 50), rng.uniform(keys_for("wide", 50), (1000,))
    torch.set_default_dtype(default)
    try:
        wide = rng.uniform(ours, (1000,), width)
    finally:
        torch.set_default_dtype(torch.float32)
    assert wide.dtype == torch.float32
    assert wide.equal(numbers * torch.tensor(width))


def test_what_is_kept_of_a_shape_is_not_changed():
    """A second draw of the same shape, and one of another between them."""
    draws = [rng.bits(keys_for("kept", 5), shape) for shape in ((3, 7), (2,), (3, 7))]
    assert draws[0].equal(draws[2])


def test_smallest_draw():
    """The finaliser maps 0 to 0, so this key draws 64 bits of 0: in range, and no infinity."""
    key = torch.tensor([2**64 - GOLDEN])
    assert rng.bits(key, (1,)).item() == 0
    assert rng.uniform(key, (1,)).item() == 0
    assert rng.integers(key, 7).item() == 0
    assert -6 < rng.normal(key, (1,)).item() < -5


@pytest.mark.parametrize("along", ["positions", "samples", "steps"])
def test_uniform(along):
    numbers = {
        "positions": lambda: rng.uniform(keys_for("a", 1), (20, 20, 50))[0],
        "samples": lambda: rng.uniform(keys_for("a", 20_000), (1,)),
        "steps": lambda: torch.cat(
            [rng.uniform(keys_for("a", torch.tensor([7]), step), (1,)) for step in range(4000)]
        ),
    }[along]().flatten()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert ks(numbers, stats.uniform) > UNLIKELY


def series(name: str, step: int = 0, shift: int = 0, position: int = 0) -> torch.Tensor:
    samples = torch.arange(4000) + shift
    return rng.uniform(keys_for(name, samples, step), (3,))[:, position]


@pytest.mark.parametrize(
    "other",
    [
        lambda: series("a", step=1),
        lambda: series("a", step=2),
        lambda: series("b"),
        lambda: series("a", shift=1),
        lambda: series("a", shift=2),
        lambda: series("a", position=1),
        lambda: series("a", position=1, shift=1),
        lambda: series("a", position=1, shift=-1),
        lambda: series("a", position=2, shift=-2),
        lambda: rng.uniform(rng.substream(keys_for("a"), "flip"), (1,))[:, 0],
        lambda: rng.uniform(rng.substream(keys_for("a"), "row"), (1,))[:, 0],
    ],
)
def test_independent(other):
    """Steps, streams, samples, positions and substreams do not correlate."""
    r = torch.corrcoef(torch.stack([series("a"), other()]))[0, 1].abs().item()
    assert r < 4 / 4000**0.5


def test_substreams_are_independent_of_each_other():
    one, two = (rng.uniform(rng.substream(keys_for("a"), name), (1,))[:, 0] for name in "xy")
    assert torch.corrcoef(torch.stack([one, two]))[0, 1].abs() < 4 / 4000**0.5


def test_no_two_samples_share_a_number():
    """Streams of neighbouring samples do not overlap: 64-bit numbers never come twice."""
    numbers = torch.cat([rng.bits(keys_for(name, 500), (60,)).flatten() for name in "ab"])
    assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("draw", [rng.uniform, rng.normal, rng.bits])
def test_same_numbers_in_any_order_and_subset(draw):
    """What makes a run the same at any number of ranks."""
    whole = draw(keys_for("a", 60), (2, 3))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert draw(keys_for("a", order), (2, 3)).equal(whole[order])
    for rank in range(3):
        mine = torch.arange(60)[rank::3]
        assert draw(keys_for("a", mine), (2, 3)).equal(whole[mine])


def test_no_state_and_no_global_state():
    before = torch.get_rng_state()
    first = rng.normal(keys_for("a"), (2,)), rng.permutation(3, 50)
    again = rng.normal(keys_for("a"), (2,)), rng.permutation(3, 50)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3, 2)])
def test_normal(shape):
    numbers = rng.normal(keys_for("n", 60_000 // 12), shape).flatten()
    assert numbers.dtype == torch.float32
    assert ks(numbers, stats.norm) > UNLIKELY


@pytest.mark.parametrize("upper", [1, 2, 5, 9, 10, 257])
def test_integers(upper):
    numbers = rng.integers(keys_for("i", 20_000), upper)
    assert numbers.dtype == torch.int64
    counts = torch.bincount(numbers)
    assert len(counts) == upper
    assert upper == 1 or stats.chisquare(counts.numpy()).pvalue > UNLIKELY


def test_permutation():
    """Every sample once an epoch, in another order each epoch, all orders alike."""
    orders = [rng.permutation(rng.stream_key(0, "order", epoch), 100) for epoch in range(500)]
    for order in orders:
        assert order.sort().values.equal(torch.arange(100))
    assert len({tuple(order.tolist()) for order in orders}) == 500
    where = torch.stack([(order == 0).nonzero()[0, 0] for order in orders])
    assert stats.chisquare(torch.bincount(where // 10, minlength=10).numpy()).pvalue > UNLIKELY


def test_permutation_of_nothing_and_of_one():
    assert rng.permutation(1, 0).tolist() == []
    assert rng.permutation(1, 1).tolist() == [0]


def test_stream_key_tells_all_parts_apart():
    parts = [
        (0, "order", 1),
        (1, "order", 1),
        (0, "order", 2),
        (0, "samples", 1),
        (0, 1, "order"),
        (0, "order"),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (1, 23),
        (12, 3),
        (),
    ]
    keys = [rng.stream_key(*each) for each in parts]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_stream_key_is_the_same_in_every_process():
    """Not Python's `hash`, which differs from process to process; a run must go on elsewhere."""
    assert rng.stream_key(0, "order", 1) == 7636051531545546627
