"""Learning rate and momentum of every step are those of torch's schedulers."""

import bisect

import pytest
import torch
from torch.optim import lr_scheduler

from dist_adv.config import OptimOptions
from dist_adv.training.schedule import lr_at, momentum_at

PEAK = 0.2


def rates(schedule, total: int) -> list[tuple[float, float]]:
    """(learning rate, momentum) of each step, as torch sets them."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], PEAK, momentum=0.9)
    scheduler = schedule(sgd, total)
    found = []
    for _ in range(total):
        found.append((sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]))
        sgd.step()
        scheduler.step()
    return found


def cyclic(sgd, total):
    return lr_scheduler.CyclicLR(
        sgd,
        base_lr=0,
        max_lr=PEAK,
        step_size_up=total // 2,
        cycle_momentum=True,
        base_momentum=0.8,
        max_momentum=0.9,
    )


TORCH = {
    "cyclic": cyclic,
    "multistep": lambda sgd, total: lr_scheduler.MultiStepLR(sgd, [total // 2, total * 3 // 4]),
    "cosine": lambda sgd, total: lr_scheduler.CosineAnnealingLR(sgd, total),
    "constant": lambda sgd, total: lr_scheduler.ConstantLR(sgd, factor=1),
}


@pytest.mark.parametrize("schedule", TORCH)
@pytest.mark.parametrize("total", [4, 10, 46, 390])
def test_rates_are_torch_s(schedule, total):
    ours = [lr_at(schedule, PEAK, step, total) for step in range(total)]
    expected = [rate for rate, _ in rates(TORCH[schedule], total)]
    assert ours == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [10, 9.5, 30])
def test_a_cosine_may_have_no_updates_left_after_its_warm_up(warmup):
    ours = [lr_at("cosine", PEAK, step, 10, warmup=warmup) for step in range(10)]
    assert ours == pytest.approx([PEAK * min(1, (step + 1) / warmup) for step in range(10)])


@pytest.mark.parametrize("schedule", ["linear", "math:exp"])
def test_a_warm_up_rises_to_what_the_rate_is_without(schedule):
    """Here to a rate that falls, and to one that grows: no jump where the warm-up ends."""
    options = {"points": {0: 1, 10: 0}}
    for step in range(100):
        without = lr_at(schedule, PEAK, step, 100, epoch=step / 10, **options)
        rate = lr_at(schedule, PEAK, step, 100, epoch=step / 10, warmup=20, **options)
        assert rate == pytest.approx(without * min(1, (step + 1) / 20))


@pytest.mark.parametrize("floor", [0.02, 0.5])
def test_a_cosine_may_end_above_zero(floor):
    """As torch's with eta_min; the configuration has it for no other schedule."""
    ours = [lr_at("cosine", PEAK, step, 46, floor=floor) for step in range(46)]
    torchs = rates(lambda sgd, total: lr_scheduler.CosineAnnealingLR(sgd, total, PEAK * floor), 46)
    assert ours == pytest.approx([rate for rate, _ in torchs], abs=1e-12)
    with pytest.raises(ValueError, match="floor: is of cosine, and the schedule is multistep"):
        OptimOptions(schedule="multistep", floor=floor)


@pytest.mark.parametrize(
    ("epochs", "milestones"),
    [(100, [70, 85]), (120, [75, 90, 100]), (76, [75]), (110, [100, 105]), (30, [7])],
)
def test_milestones_are_those_of_torch_in_epochs(epochs, milestones):
    """Shares of the run, to the step: at 391 batches an epoch."""
    total, shares = 391 * epochs, [milestone / epochs for milestone in milestones]
    ours = [lr_at("multistep", PEAK, step, total, milestones=shares) for step in range(total)]
    steps = [391 * milestone for milestone in milestones]
    expected = [PEAK * 0.1 ** bisect.bisect_right(steps, step) for step in range(total)]
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rise", [0.1, 0.25, 0.8])
@pytest.mark.parametrize("total", [10, 390])
def test_a_triangle_may_rise_faster_than_it_falls(rise, total):
    """As torch's CyclicLR with a step_size_up other than its step_size_down."""

    def lopsided(sgd, total):
        up = rise * total
        return lr_scheduler.CyclicLR(
            sgd, 0, PEAK, up, total - up, base_momentum=0.8, max_momentum=0.9
        )

    expected = rates(lopsided, total)
    ours = [
        (lr_at("cyclic", PEAK, step, total, rise), momentum_at(0.9, True, step, total, rise))
        for step in range(total)
    ]
    assert ours == [pytest.approx(pair, abs=1e-12) for pair in expected]


@pytest.mark.parametrize("total", [4, 10, 390])
def test_momentum_cycles_as_torch_s(total):
    ours = [momentum_at(0.9, True, step, total) for step in range(total)]
    assert ours == pytest.approx([momentum for _, momentum in rates(cyclic, total)], abs=1e-12)


def test_momentum_is_constant_unless_told_otherwise():
    assert {momentum_at(0.9, False, step, 10) for step in range(10)} == {0.9}


@pytest.mark.parametrize("total", [1, 2, 3, 7, 391])
@pytest.mark.parametrize("schedule", TORCH)
def test_any_length_is_in_range(schedule, total):
    """An odd number of steps too; the triangle starts at 0 and is symmetric about its peak."""
    ours = [lr_at(schedule, PEAK, step, total) for step in range(total)]
    assert all(0 <= rate <= PEAK for rate in ours)
    if schedule == "cyclic":
        assert ours[0] == 0
        assert ours[1:] == pytest.approx(ours[:0:-1])
