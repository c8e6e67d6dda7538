"""Disks that are full, limited or read-only, and dashboards that are not there."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_adv import checkpoint
from launch import Job, checkpoints, family, status, weights_hash, write_config

pytestmark = pytest.mark.slow

TRAIN = {"epochs": 30, "save_steps": 1, "keep": 2}


@pytest.fixture(scope="module")
def config(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("c") / "free.yaml", "free", images, train=TRAIN)


@pytest.fixture(scope="module")
def truth(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("truth") / "run"
    Job(config, run_dir).finish()
    return weights_hash(run_dir)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MB: a checkpoint of these runs is 1.4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def failed(job: Job) -> str:
    """The one line of a job that fails as it should."""
    assert job.wait() == 1, job.output()
    assert "Traceback" not in job.output()
    assert "Logging error" not in job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("dist-adv:")]
    return line


def check_what_is_left(run_dir: Path) -> None:
    """Good checkpoints and nothing that looks like one."""
    names = checkpoints(run_dir)
    assert names
    assert all(name.startswith("step-") for name in names)
    for name in names:
        checkpoint.load(run_dir / "checkpoints" / name)


def fill(disk: Path, leave: int) -> Path:
    """Something else takes the room, all but about `leave` bytes."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(max(0, free - leave)))
    return filler


def test_full_disk_during_a_save(config, truth, disk):
    run_dir = disk / "run"
    job = Job(config, run_dir, arguments=("train.keep=1000",))  # until the disk is full
    line = failed(job)
    assert "checkpoints/step-" in line
    assert "could not be written" in line
    assert "No space left" in line
    check_what_is_left(run_dir)
    shutil.copytree(run_dir, disk.parent / "run")  # where there is room
    Job(config, disk.parent / "run").finish()
    assert weights_hash(disk.parent / "run") == truth


def test_full_disk_between_saves(images, disk):
    """Not even a line of metrics or of the log fits."""
    train = {"epochs": 400, "log_every": 1, "save_minutes": None}
    config = write_config(disk.parent / "c.yaml", "free", images, train=train)
    job = Job(config, disk / "run")
    assert job.wait_for_checkpoint(2 * 12)
    filler = fill(disk, leave=0)
    line = failed(job)
    assert "could not be written" in line
    assert "No space left" in line
    filler.unlink()
    check_what_is_left(disk / "run")
    again = Job(config, disk / "run")
    assert again.wait_until(lambda: "going on from" in again.output())
    assert again.wait_until(lambda: " pass " in again.output())
    again.kill()


@pytest.mark.parametrize("kilobytes", [20, 400])
def test_file_size_limit(kilobytes, config, truth, tmp_path):
    """Weights do not fit; nor, with 20 kB, do pictures of the attack or a long log."""
    limit = ["prlimit", f"--fsize={kilobytes * 1024}", "--pid"]
    job = Job(config, tmp_path / "run")
    assert job.wait_for_checkpoint(12)
    subprocess.run([*limit, str(job.process.pid)], check=True)
    line = failed(job)
    assert "could not be written" in line
    assert "File too large" in line
    check_what_is_left(tmp_path / "run")
    Job(config, tmp_path / "run").finish()
    assert weights_hash(tmp_path / "run") == truth


def test_folder_that_becomes_read_only(config, truth, tmp_path):
    """For root, too: the file system itself refuses."""
    folder = tmp_path / "run" / "checkpoints"
    job = Job(config, tmp_path / "run")
    assert job.wait_for_checkpoint(12)
    done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, text=True)
    if done.returncode:
        job.kill()
        pytest.skip(f"this file system cannot: {done.stderr.strip()}")
    try:
        line = failed(job)
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    assert "checkpoints/step-" in line
    assert "could not be written" in line
    check_what_is_left(tmp_path / "run")
    Job(config, tmp_path / "run").finish()
    assert weights_hash(tmp_path / "run") == truth


def test_final_files_that_do_not_fit(images, tmp_path):
    """The weights are there; pictures and results are not, and are made when there is room."""
    evaluation = {"attacks": ["natural", "pgd-500"], "batch_size": 1}
    ball = {"eps": 0.0}  # in which nothing ever falls: all 500 steps are taken
    config = write_config(tmp_path / "c.yaml", "natural", images, eval=evaluation, threat=ball)
    job = Job(config, tmp_path / "run")
    assert job.wait_until((tmp_path / "run" / "model.safetensors").exists)
    subprocess.run(["prlimit", "--fsize=1500", "--pid", str(job.process.pid)], check=True)
    assert "could not be written" in failed(job)
    weights = weights_hash(tmp_path / "run")
    Job(config, tmp_path / "run").finish()
    assert weights_hash(tmp_path / "run") == weights
    assert (tmp_path / "run" / "examples.safetensors").exists()
    assert status(tmp_path / "run")["state"] == "done"


def test_wandbs_helper_that_dies_stops_nothing(images, tmp_path):
    train = {"epochs": 60, "log_every": 1}
    track = {"wandb": {"mode": "offline"}}
    config = write_config(tmp_path / "c.yaml", "free", images, train=train, track=track)
    plain = write_config(tmp_path / "p.yaml", "free", images, train=train)
    Job(plain, tmp_path / "plain").finish()
    job = Job(config, tmp_path / "run", env={"WANDB_MODE": "offline"})
    assert job.wait_for_checkpoint(24)
    members = family(job.process.pid)
    helpers = [pid for pid, command in members.items() if "wandb-core" in command]
    assert helpers
    for pid in helpers:
        os.kill(pid, signal.SIGKILL)
    job.finish()
    assert "Traceback" not in job.output()
    assert weights_hash(tmp_path / "run") == weights_hash(tmp_path / "plain")
    lines = [
        (tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("run", "plain")
    ]
    assert lines[0] == lines[1]
