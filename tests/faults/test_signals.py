"""Asked to stop, the ranks stop after the same batch, and the same command goes on from there."""

import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dist_adv
from dist_adv.runs import checkpoint
from launch import SMALL, Job, checkpoints, family, status, weights_hash, write_config

pytestmark = pytest.mark.slow

OURS = f'File "{Path(dist_adv.__file__).parent}/'  # in a traceback through dist_adv
EPOCHS, BATCHES, REPLAYS = 12, 4, 3
EPOCH = BATCHES * REPLAYS  # optimiser steps


def settings(path: Path, images: Path, **sections: dict) -> Path:
    """Free carries a perturbation from batch to batch and takes several steps for each of them."""
    train = {"epochs": EPOCHS, **sections.pop("train", {})}
    return write_config(path / "run.yaml", "free", images, train=train, model=SMALL, **sections)


@pytest.fixture(scope="module")
def truth(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run of one or two ranks that nothing interrupts, with a checkpoint of every batch."""

    @functools.cache
    def run(ranks: int) -> Path:
        path = tmp_path_factory.mktemp(f"truth-{ranks}")
        config = settings(path, images, train={"save_steps": 1, "keep": 1000})
        Job(config, path / "run", ranks).finish()
        assert len(checkpoints(path / "run")) == EPOCHS * BATCHES
        return path / "run"

    return run


@pytest.fixture(scope="module")
def many_test_images(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images to train on, and 300 to test on: one by one they take seconds."""
    root = tmp_path_factory.mktemp("many")
    shutil.copytree(images / "train", root / "train")
    noise = np.random.default_rng(1)
    for label in "abc":
        (root / "test" / label).mkdir(parents=True)
        for i in range(100):
            pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "test" / label / f"{i}.png")
    return root


def stopped(job: Job, reason: str, truth: Path, alone: int = 143) -> int:
    """The step where a job has stopped, after a check of all that it promises."""
    exit_status = job.wait(60)
    output = job.output()
    assert exit_status == (alone if job.count == 1 else 1), output
    step = check_stop(job, reason, truth)
    if job.count == 1:
        assert "Traceback" not in output
    return step


def check_stop(job: Job, reason: str, truth: Path) -> int:
    """The same whatever became of the launcher."""
    output, found = job.output(), status(job.run_dir)
    assert (found["state"], found["reason"]) == ("preempted", reason), output
    words = (
        f"dist-adv: stopped ({reason}); the same command goes on, from the last checkpoint where "
        "there is one"
    )
    assert [line for line in output.splitlines() if line.startswith("dist-adv:")] == [words]
    assert OURS not in output
    step = found["step"]
    assert step % REPLAYS == 0
    names = checkpoints(job.run_dir)
    assert names[-1] == f"step-{step:09d}"
    assert not [name for name in names if not name.startswith("step-")]
    check_same(job.run_dir, truth, names[-1])
    return step


def check_same(run_dir: Path, truth: Path, name: str) -> None:
    """A checkpoint is bit for bit that of the uninterrupted run after the same batch."""
    found, expected = (checkpoint.load(path / "checkpoints" / name) for path in (run_dir, truth))
    for group, tensors in expected.groups.items():
        assert tensors.keys() == found.groups[group].keys()
        assert all(torch.equal(tensors[key], found.groups[group][key]) for key in tensors), group
    for key in ("epoch", "batch", "step"):
        assert found.state["clock"][key] == expected.state["clock"][key]


def finished(job: Job, truth: Path) -> None:
    """The end is that of the run that was not interrupted, with every epoch in its record once."""
    job.finish()
    assert status(job.run_dir)["state"] == "done"
    assert weights_hash(job.run_dir) == weights_hash(truth)
    found, expected = epochs(job.run_dir), epochs(truth)
    assert [each["epoch"] for each in found] == list(range(1, EPOCHS + 1))
    for key in ("step", "train_accuracy"):
        assert [each[key] for each in found] == [each[key] for each in expected]


def epochs(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "epoch"]


def results(run_dir: Path) -> list[dict]:
    path = run_dir / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_signal_to_one_rank_stops_every_rank_after_the_same_batch(images, truth, tmp_path):
    """Three stops of one run, whichever rank hears of it."""
    config, run_dir = settings(tmp_path, images), tmp_path / "run"
    step = 0
    for number, rank in ((signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGTERM, 0)):
        job = Job(config, run_dir, ranks=2)
        assert job.wait_for_checkpoint((step // EPOCH + 1) * EPOCH)
        job.signal(number, rank)
        before, step = step, stopped(job, number.name, truth(2))
        assert before < step < EPOCHS * EPOCH
    finished(Job(config, run_dir, ranks=2), truth(2))


def test_a_signal_to_every_process_and_wandbs_helper(images, truth, tmp_path):
    """As a batch system sends it: to the launcher, the ranks and what they have started."""
    config = settings(tmp_path, images, track={"wandb": {"mode": "offline"}})
    offline = {"WANDB_MODE": "offline"}
    job = Job(config, tmp_path / "run", ranks=2, env=offline)
    assert job.wait_for_checkpoint(EPOCH)
    pids = family(job.process.pid)
    assert any("wandb-core" in command for command in pids.values())
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert stopped(job, "SIGTERM", truth(2)) < EPOCHS * EPOCH
    finished(Job(config, tmp_path / "run", ranks=2, env=offline), truth(2))


def test_ranks_whose_launcher_was_killed_save_and_leave(images, truth, tmp_path):
    config, run_dir = settings(tmp_path, images), tmp_path / "run"
    job = Job(config, run_dir, ranks=2)
    assert job.wait_for_checkpoint(EPOCH)
    ranks = job.ranks()
    assert sorted(ranks) == [0, 1]
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    end = time.monotonic() + 120  # they take a second; a busy machine takes longer
    while any(map(alive, ranks.values())) and time.monotonic() < end:
        time.sleep(0.05)
    left = [rank for rank, pid in ranks.items() if alive(pid)]
    for rank in left:
        os.kill(ranks[rank], signal.SIGKILL)
    assert not left
    assert check_stop(job, "launcher died", truth(2)) < EPOCHS * EPOCH
    finished(Job(config, run_dir, ranks=2), truth(2))


def alive(pid: int) -> bool:
    """A process that is gone but not yet collected by its new parent is not alive."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_signals_to_a_single_process(images, truth, tmp_path):
    """Ctrl-C, and a second signal while the first is being heeded: four starts of one run."""
    config, run_dir = settings(tmp_path, images), tmp_path / "run"
    cases = (
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM, signal.SIGTERM), 143),
        # In this order: of signals that came during one call into torch Python handles the lower
        # number first, and on a busy machine such a call may take longer than what lies between.
        ((signal.SIGUSR1, signal.SIGTERM), 143),
    )
    step = 0
    for numbers, exit_status in cases:
        job = Job(config, run_dir)
        assert job.wait_for_checkpoint((step // EPOCH + 1) * EPOCH)
        for number in numbers:
            job.signal(number)
            time.sleep(0.02)
        before, step = step, stopped(job, numbers[0].name, truth(1), exit_status)
        assert before < step < EPOCHS * EPOCH
    finished(Job(config, run_dir), truth(1))


def test_a_stop_file_stops_once(images, truth, tmp_path):
    config, run_dir = settings(tmp_path, images), tmp_path / "run"
    job = Job(config, run_dir)
    assert job.wait_for_checkpoint(EPOCH)
    job.signal(signal.SIGSTOP)
    time.sleep(1.1)  # it looks once a second, in which a fast machine ends the whole run
    (run_dir / "STOP").touch()
    job.signal(signal.SIGCONT)
    assert stopped(job, "stop file", truth(1)) < EPOCHS * EPOCH
    assert not (run_dir / "STOP").exists()
    finished(Job(config, run_dir), truth(1))


def test_a_deadline_saves_and_leaves(images, truth, tmp_path):
    """0.1 s: before the first epoch has ended. Its batch of that moment is saved all the same."""
    config, run_dir = settings(tmp_path, images), tmp_path / "run"
    job = Job(config, run_dir, arguments=("train.max_minutes=0.0017",))
    assert stopped(job, "train.max_minutes", truth(1)) < EPOCHS * EPOCH
    finished(Job(config, run_dir), truth(1))


def test_a_signal_while_a_checkpoint_is_written(images, truth, tmp_path):
    config, run_dir = settings(tmp_path, images, train={"save_steps": 1}), tmp_path / "run"
    job = Job(config, run_dir)
    assert job.wait_for_checkpoint(EPOCH)
    assert job.wait_until(lambda: list((run_dir / "checkpoints").glob(".partial-step-*")))
    job.signal(signal.SIGTERM)
    assert stopped(job, "SIGTERM", truth(1)) < EPOCHS * EPOCH
    assert len(checkpoints(run_dir)) == 2  # train.keep
    finished(Job(config, run_dir), truth(1))


def test_a_signal_during_the_evaluation_of_an_epoch(many_test_images, truth, tmp_path):
    """It stops before the epoch is closed; going on measures the epoch and writes its line."""
    curve = {"every": 8, "curve_attack": "pgd-2", "curve_limit": None, "batch_size": 1}
    config = settings(tmp_path, many_test_images, eval=curve)
    job = Job(config, tmp_path / "run", ranks=2)
    assert job.wait_for_checkpoint(8 * EPOCH)
    time.sleep(0.1)  # natural accuracy alone takes longer
    job.signal(signal.SIGTERM, 1)
    assert stopped(job, "SIGTERM", truth(2)) == 8 * EPOCH
    assert len(epochs(job.run_dir)) == 7
    finished(Job(config, tmp_path / "run", ranks=2), truth(2))
    assert [each.get("curve_n") for each in epochs(job.run_dir)[7:]] == [300, None, None, None, 300]


def test_a_signal_during_the_final_evaluation(many_test_images, truth, tmp_path):
    """Training is over: only what was not measured yet is measured when it goes on."""
    measured = {"attacks": ["natural", "pgd-2"], "batch_size": 1}
    config, run_dir = settings(tmp_path, many_test_images, eval=measured), tmp_path / "run"
    job = Job(config, run_dir)
    assert job.wait_until((run_dir / "model.safetensors").exists)
    time.sleep(0.05)  # natural accuracy alone takes longer
    job.signal(signal.SIGTERM)
    assert stopped(job, "SIGTERM", truth(1)) == EPOCHS * EPOCH
    assert weights_hash(run_dir) == weights_hash(truth(1))
    assert results(run_dir) == []
    again = Job(config, run_dir)
    finished(again, truth(1))
    assert "is trained already" in again.output()
    assert [(each["attack"], each["n"]) for each in results(run_dir)] == [
        ("natural", 300),
        ("pgd-2", 300),
    ]
