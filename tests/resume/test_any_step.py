"""A run goes on from any batch, at the same or another number of ranks, to the same weights."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import forked
from cases import CASES, config
from dist_adv import load_model
from dist_adv.config import parse_config
from dist_adv.training.run import train_run

TRAIN_ALL = str(Path(__file__).parents[1] / "support" / "train_all.py")


def equal(one: Path, two: Path) -> bool:
    expected, found = load_model(one).state_dict(), load_model(two).state_dict()
    return all(torch.equal(expected[name], found[name]) for name in expected)


def difference(one: Path, two: Path) -> float:
    """Of the files: load_model gives single precision."""
    expected, found = (load_file(run_dir / "model.safetensors") for run_dir in (one, two))
    assert expected["normalize.mean"].dtype == torch.float64
    return max((expected[name] - found[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_goes_on_bit_for_bit_from_any_batch(case, images, tmp_path):
    tree = config(case, "batch", images, small=True)
    tree["train"] |= {"save_steps": 1, "keep": 100}
    settings = parse_config(tree, case)
    train_run(settings, tmp_path / "whole", "none")
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(checkpoints) == 8  # two passes of four batches
    for path in checkpoints:
        train_run(settings, tmp_path / path.name, str(path))
        assert equal(tmp_path / "whole", tmp_path / path.name), path.name


@pytest.fixture(scope="module")
def all_cases(tmp_path_factory: pytest.TempPathFactory, images: Path):
    """Every case trained at `ranks`, from the beginning or from a checkpoint of another such."""
    made: dict[tuple, Path] = {}

    def train(ranks: int, norm: str, numbers: str, start: Path | None = None, at: int = 0) -> Path:
        key = (ranks, norm, numbers, start, at)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{ranks}-{norm}")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks), TRAIN_ALL]
            command += [str(made[key]), norm, str(images), numbers]
            command += [str(start), str(at)] if start else []
            done = forked.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
        return made[key]

    return train


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.shares("ranks")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("ranks", "at"), [(2, 1), (2, 5), (3, 2)])
def test_several_ranks_go_on_bit_for_bit_in_mid_pass(ranks, at, case, all_cases):
    """Each rank with its own BatchNorm statistics and its own rows of Free's perturbation."""
    whole = all_cases(ranks, "batch", "fp32-small")
    resumed = all_cases(ranks, "batch", "fp32-small", whole, at)
    assert equal(whole / case, resumed / case)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(case, all_cases):
    """2 -> 1 -> 2 ranks and 1 -> 3, in double precision: see tests/parity about single."""
    two = all_cases(2, "group", "fp64-small")
    alone = all_cases(1, "group", "fp64-small", two, 2)  # after three of eight batches
    two_again = all_cases(2, "group", "fp64-small", alone, 2)  # after three more
    three = all_cases(3, "group", "fp64-small", all_cases(1, "group", "fp64-small"), 2)
    for resumed in (alone, two_again, three):
        assert difference(two / case, resumed / case) < 1e-10
