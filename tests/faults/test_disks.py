"""Disks that are full, limited or read-only, and dashboards that are not there."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_adv import checkpoint
from launch import Job, checkpoints, status, weights_hash, write_config

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


def test_disk_that_becomes_read_only(config, truth, disk):
    job = Job(config, disk / "run")
    assert job.wait_for_checkpoint(12)
    remount = ["mount", "-o", "remount,ro", str(disk)]
    # Refused as long as a file is open for writing, which the log is: force it as a failing
    # device would be.
    job.signal(signal.SIGSTOP)
    done = subprocess.run(remount, capture_output=True, text=True)
    job.signal(signal.SIGCONT)
    if done.returncode:
        job.kill()
        pytest.skip(f"not while files are open: {done.stderr.strip()}")
    line = failed(job)
    assert "could not be written" in line
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    check_what_is_left(disk / "run")
    Job(config, disk / "run").finish()
    assert weights_hash(disk / "run") == truth


def test_final_files_that_do_not_fit(images, tmp_path):
    """The weights are there; pictures and results are not, and are made when there is room."""
    evaluation = {"attacks": ["natural", "pgd-400"], "batch_size": 1}
    config = write_config(tmp_path / "c.yaml", "natural", images, eval=evaluation)
    job = Job(config, tmp_path / "run")
    assert job.wait_until((tmp_path / "run" / "model.safetensors").exists)
    subprocess.run(["prlimit", "--fsize=0", "--pid", str(job.process.pid)], check=True)
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
    helpers = subprocess.run(
        ["pgrep", "--session", str(job.process.pid), "wandb-core"], capture_output=True, text=True
    ).stdout.split()
    assert helpers
    for pid in helpers:
        os.kill(int(pid), signal.SIGKILL)
    job.finish()
    assert "Traceback" not in job.output()
    assert weights_hash(tmp_path / "run") == weights_hash(tmp_path / "plain")
    lines = [
        (tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("run", "plain")
    ]
    assert lines[0] == lines[1]
