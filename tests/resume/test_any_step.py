"""A run goes on from any batch, at the same or another number of ranks, to the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cases import AT_THREE, SHARED, config
from dist_adv import load_model
from dist_adv.config import parse_config
from dist_adv.training.run import train_run


def equal(one: Path, two: Path) -> bool:
    expected, found = load_model(one).state_dict(), load_model(two).state_dict()
    return all(torch.equal(expected[name], found[name]) for name in expected)


def difference(one: Path, two: Path) -> float:
    """Of the files: load_model gives single precision."""
    expected, found = (load_file(run_dir / "model.safetensors") for run_dir in (one, two))
    assert expected["normalize.mean"].dtype == torch.float64
    return max((expected[name] - found[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize("case", SHARED)
def test_one_rank_goes_on_bit_for_bit(case, images, tmp_path):
    tree = config(case, "batch", images, small=True)
    tree["train"] |= {"save_steps": 1, "keep": 100}
    settings = parse_config(tree, case)
    train_run(settings, tmp_path / "whole", "none")
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    first, second = (8, 15) if case == "stages" else (4, 4)  # batches of its two epochs
    assert len(checkpoints) == first + second
    # An epoch's last, and in the middle of one.
    for path in (checkpoints[first - 1], checkpoints[first + 1]):
        train_run(settings, tmp_path / path.name, str(path))
        assert equal(tmp_path / "whole", tmp_path / path.name), path.name


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.shares("ranks")
@pytest.mark.parametrize(
    ("ranks", "at", "case"),
    [*((2, 5, case) for case in SHARED), *((3, 2, case) for case in AT_THREE)],
)
def test_several_ranks_go_on_bit_for_bit_in_mid_epoch(ranks, at, case, trained):
    """Each rank with its own BatchNorm statistics and its own rows of Free's perturbation."""
    whole = trained(ranks, "batch", "fp32-small")
    resumed = trained(ranks, "batch", "fp32-small", whole, at)
    assert equal(whole / case, resumed / case)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.shares
@pytest.mark.parametrize("case", SHARED)
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(case, trained):
    """2 -> 1 -> 3 ranks, in double precision: see tests/parity about single."""
    two = trained(2, "group", "fp64-small")
    alone = trained(1, "group", "fp64-small", two, 2)  # after three of eight batches
    assert difference(two / case, alone / case) < 1e-10
    if case in AT_THREE:
        three = trained(3, "group", "fp64-small", alone, 2)  # after three more
        assert difference(two / case, three / case) < 1e-10
