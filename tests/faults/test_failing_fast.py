"""What cannot go on stops soon, says why in one line, and leaves good checkpoints behind."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dist_adv
from dist_adv.runs import checkpoint
from launch import SMALL, Job, checkpoints, status, weights_hash, write_config

pytestmark = pytest.mark.slow

OURS = f'File "{Path(dist_adv.__file__).parent}/'  # in a traceback through dist_adv
REPLAYS = 3
# torchrun kills what is left of its ranks after half a minute. Here it does not: they have to go.
PATIENT = {"PET_SHUTDOWN_TIMEOUT": "3600"}
TRAIN = {"epochs": 6, "save_steps": 1, "keep": 1000}


@pytest.fixture(scope="module")
def config(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("c") / "free.yaml", "free", images, train=TRAIN, model=SMALL
    )


@pytest.fixture(scope="module")
def truth(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks to which nothing happens."""
    run_dir = tmp_path_factory.mktemp("truth") / "run"
    Job(config, run_dir, 2).finish()
    return run_dir


def complaints(job: Job) -> list[str]:
    return [line for line in job.output().splitlines() if line.startswith("dist-adv:")]


def check_same_checkpoints(run_dir: Path, truth: Path) -> list[str]:
    """Every checkpoint on disk is that of the run to which nothing happened."""
    names = checkpoints(run_dir)
    for name in names:
        found, expected = (
            checkpoint.load(path / "checkpoints" / name) for path in (run_dir, truth)
        )
        for group, tensors in expected.groups.items():
            assert all(torch.equal(tensors[key], found.groups[group][key]) for key in tensors)
    return names


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_takes_the_job_down(victim, config, truth, tmp_path):
    job = Job(config, tmp_path / "run", 2, env=PATIENT)
    assert job.wait_for_checkpoint(4 * REPLAYS)
    os.kill(job.ranks()[victim], signal.SIGKILL)
    assert job.wait() == 1
    assert f"rank      : {victim} (local_rank: {victim})" in job.output()
    assert "Signal 9 (SIGKILL)" in job.output()
    assert OURS not in job.output()
    lines = complaints(job)
    assert len(lines) <= 1  # the survivor may be ended by its launcher before it speaks
    assert all(f"rank {1 - victim} of 2 lost another rank" in line for line in lines)
    Job(config, tmp_path / "run", 2).finish()
    assert weights_hash(tmp_path / "run") == weights_hash(truth)


def test_a_survivor_that_was_told_to_go_does_not_wait(config, tmp_path):
    """Its launcher's SIGTERM may come before it has noticed what happened."""
    job = Job(config, tmp_path / "run", 2, env=PATIENT)
    assert job.wait_for_checkpoint(REPLAYS)
    job.signal(signal.SIGSTOP, 1)
    job.signal(signal.SIGKILL, 0)
    time.sleep(1)
    os.kill(job.ranks()[1], signal.SIGCONT)
    assert job.wait() == 1


def test_a_survivor_that_hangs_leaves(config, tmp_path):
    """Deaf to its launcher."""
    job = Job(config, tmp_path / "run", 2, module="faulty", env=PATIENT | {"FAULT": "sleep:1:8"})
    assert job.wait_for_checkpoint(2 * REPLAYS)
    time.sleep(1)
    job.signal(signal.SIGKILL, 0)
    assert job.wait() == 1
    (line,) = complaints(job)
    assert line.startswith("dist-adv: rank 1 of 2 lost another rank (0 is gone)")


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(kind, config, truth, tmp_path):
    """The fourth update of rank 1 is the first of batch 2; only batch 1 has been saved."""
    job = Job(config, tmp_path / "run", 2, module="faulty", env={"FAULT": f"{kind}:1:4"})
    assert job.wait() == 1
    (line,) = complaints(job)
    assert "the loss of rank 1 was not finite at optimiser step 4 (epoch 1, batch 2)" in line
    assert OURS not in job.output()
    assert status(tmp_path / "run")["state"] == "failed"
    assert check_same_checkpoints(tmp_path / "run", truth) == ["step-000000003"]


def test_a_bad_update_may_be_skipped(images, tmp_path):
    """On one rank or two: the same updates are missing, and no statistics are spoilt."""
    weights = {}
    for ranks in (1, 2):
        keys = {"epochs": 2, "on_nan": "skip", "skip_limit": 2, "log_every": 1}
        path = tmp_path / f"{ranks}.yaml"
        config = write_config(path, "fast-random", images, "group", train=keys, model=SMALL)
        run_dir, env = tmp_path / f"run-{ranks}", {"FAULT": "nan:0:3:5"}
        job = Job(config, run_dir, ranks, module="faulty", env=env)
        job.finish()
        assert "2 updates skipped; the loss of rank 0 was not finite" in job.output()
        weights[ranks] = load_file(run_dir / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights[ranks].values())
    apart = max((weights[1][name] - weights[2][name]).abs().max() for name in weights[1])
    assert apart < 1e-2  # see the invariance record; two updates more are 1e-1


def test_statistics_of_skipped_updates_are_forgotten(images, tmp_path):
    """With BatchNorm a NaN in the images would stay in the running mean for good."""
    keys = {"epochs": 2, "on_nan": "skip", "log_every": 1}
    config = write_config(tmp_path / "c.yaml", "natural", images, train=keys, model=SMALL)
    job = Job(config, tmp_path / "run", module="faulty", env={"FAULT": "poison:0:3"})
    job.finish()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_too_many_bad_updates_stop(config, tmp_path):
    arguments = ("train.on_nan=skip", "train.skip_limit=2")
    env = {"FAULT": "nan:0:4:5:6"}
    job = Job(config, tmp_path / "run", 1, arguments, "faulty", env)
    assert job.wait() == 1
    (line,) = complaints(job)
    assert "more than train.skip_limit=2 updates were skipped" in line
    assert "Traceback" not in job.output()


def test_a_rank_that_hangs_ends_the_job_with_every_stack(config, tmp_path):
    env = {"FAULT": "sleep:1:8"}
    job = Job(config, tmp_path / "run", 2, ("train.timeout_minutes=0.1",), "faulty", env)
    assert job.wait(90) == 1
    first, second = job.output().split("dist-adv: rank ")[1:3]
    stacks = dict(sorted((text[0], text) for text in (first, second)))
    assert list(stacks) == ["0", "1"]
    for text in stacks.values():
        assert "of 2 has made no progress for 6 s (train.timeout_minutes)" in text
        assert "in fit" in text
    assert "faulty.py" in stacks["1"]
    assert "backward" in stacks["0"]


def test_no_memory_left_names_a_batch_size(config, tmp_path):
    job = Job(config, tmp_path / "run", 2, module="faulty", env={"FAULT": "oom:1:8"})
    assert job.wait() == 1
    (line,) = [line for line in complaints(job) if "memory" in line]
    assert line.startswith("dist-adv: rank 1 of 2 has no memory left")
    assert "try train.batch_size=16 instead of 33" in line
    assert OURS not in job.output()


@pytest.mark.parametrize("section", ["train", "eval"])
def test_no_compiler_is_one_line(section, images, tmp_path):
    """torch looks for one in CXX and on the PATH; a cache of compiled code would do without."""
    compiled = {section: {"compile": "default"}}
    config = write_config(tmp_path / "c.yaml", "natural", images, model=SMALL, **compiled)
    env = {"PATH": "/nowhere", "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    job = Job(config, tmp_path / "run", env=env)
    assert job.wait() == 1
    (line,) = complaints(job)
    assert line.startswith(f"dist-adv: {section}.compile: torch.compile failed on rank 0 of 1")
    assert f"set {section}.compile=none, or install a C++ compiler" in line
    assert OURS not in job.output()
