"""Disks that fill up, refuse or go away, and a dashboard that does: the run ends with one line or
goes on, and the same command ends with the weights of a run that had no such trouble.

The disks are small tmpfs mounts. Where mounting them is not permitted, each test runs itself in
a namespace of its own (`unshare -rm`), and is skipped where that is not permitted either.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dist_adv
from dist_adv import cli
from dist_adv.config import load_config
from dist_adv.errors import UserError
from dist_adv.runs import checkpoint
from dist_adv.training.run import train_run
from launch import SMALL, Job, checkpoints, status, weights_hash, write_config
from limits import limited

pytestmark = pytest.mark.slow

OURS = f'File "{Path(dist_adv.__file__).parent}/'  # in a traceback through dist_adv
PAGE = 4096
BATCHES = 30  # an epoch: more than a page of metrics
STEPS = 2 * BATCHES
MODEL = {"model": SMALL | {"width": 8}}  # a checkpoint is much larger than all other files
SOME = {"attacks": ["natural", "pgd-2"], "every": 0}
ALL_METRICS = [("train", step) for step in range(1, STEPS + 1)]
ALL_METRICS += [("epoch", BATCHES), ("epoch", STEPS)]


def settings(path: Path, images: Path, **sections: dict[str, Any]) -> Path:
    train = {"batch_size": 4, "log_every": 1, **sections.pop("train", {})}
    sections = {"eval": SOME, **sections}
    return write_config(path / "run.yaml", "fast-random", images, train=train, **MODEL | sections)


@pytest.fixture(scope="module")
def truth(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that has all the room it wants."""
    path = tmp_path_factory.mktemp("truth")
    train_run(load_config(settings(path, images)), path / "run", "none")
    return path / "run"


# --- disks ---------------------------------------------------------------------------------------


def mount(*arguments: object) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


class Disk:
    """A small one, with nothing else on it."""

    def __init__(self, path: Path) -> None:
        self.path, self.filler = path, path / "filler"

    def resize(self, run_dir: Path, checkpoints: float) -> None:
        """To so many checkpoints of a run, and the files beside them: a page or two each."""
        some = next((run_dir / "checkpoints").iterdir())
        pages = 10 + int(checkpoints * sum(map(pages_of, some.iterdir())))
        assert mount("-o", f"remount,size={pages * PAGE}", self.path)

    def fill(self, pages_left: int = 0) -> None:
        """Until it is full but for so many pages."""
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(PAGE))
            except OSError:
                pass
            file.truncate(file.tell() - pages_left * PAGE)

    def make_room(self) -> None:
        self.filler.unlink()


def pages_of(path: Path) -> int:
    return -(-path.stat().st_size // PAGE)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", path):
        again_in_a_namespace(request.node.nodeid.split("::", 1)[1])
    yield Disk(path)
    for place in (path / "run", path):  # the first where a test has not undone its mount
        subprocess.run(["umount", "--lazy", place], capture_output=True)


def again_in_a_namespace(test: str) -> None:
    """Run this test once more where this user may mount."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "x", "/mnt"]).returncode:
        pytest.skip("may neither mount a tmpfs nor make a namespace to do so")
    command = [*unshare, sys.executable, "-m", "pytest", f"{__file__}::{test}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    pytest.skip("passed in a namespace of its own")


def stopped_at(job: Job, seen: Path) -> None:
    """The job does not move any more from shortly after `seen` is there."""
    assert job.wait_until(seen.exists), job.output()
    job.signal(signal.SIGSTOP)


# --- what is promised ----------------------------------------------------------------------------


def failed(job: Job, *words: str) -> str:
    """Status 1 and one line, with these words; the line."""
    exit_status, output = job.wait(), job.output()
    complaints = [line for line in output.splitlines() if line.startswith("dist-adv: ")]
    assert len(complaints) == 1, output
    assert [word for word in words if word not in complaints[0]] == [], output
    assert OURS not in output, output
    assert job.count > 1 or "Traceback" not in output, output
    assert exit_status == 1, output
    return complaints[0]


def intact(run_dir: Path, *steps: int) -> None:
    """These checkpoints are there and good, and nothing else lies beside them."""
    assert checkpoints(run_dir) == [f"step-{step:09d}" for step in steps]
    for step in steps:
        found = checkpoint.load(run_dir / "checkpoints" / f"step-{step:09d}")
        assert found.state["clock"]["step"] == step
    assert [path.name for path in run_dir.glob(".partial-*")] == []


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that may not be there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def goes_on(config: Path, run_dir: Path, truth: Path) -> None:
    """The same command ends as if nothing had happened, and everything is there once."""
    train_run(load_config(config), run_dir, "auto")
    whole(run_dir, truth)


def whole(run_dir: Path, truth: Path) -> None:
    assert weights_hash(run_dir) == weights_hash(truth)
    # What was logged beyond the checkpoint may be there twice; the report takes the last.
    found = {(line["kind"], line["step"]): line for line in lines(run_dir / "metrics.jsonl")}
    expected = {(line["kind"], line["step"]): line for line in lines(truth / "metrics.jsonl")}
    assert sorted(found) == sorted(ALL_METRICS) == sorted(expected)
    key = "train_loss", "loss"
    for where, line in expected.items():
        assert [found[where].get(k) for k in key] == [line.get(k) for k in key], where
    results = lines(run_dir / "results.jsonl")
    assert [line["attack"] for line in results] == SOME["attacks"]
    theirs = lines(truth / "results.jsonl")
    assert [line["correct"] for line in results] == [line["correct"] for line in theirs]
    pictures, expected_pictures = (
        load_file(folder / "examples.safetensors") for folder in (run_dir, truth)
    )
    assert pictures.keys() == expected_pictures.keys()
    assert all(torch.equal(pictures[name], expected_pictures[name]) for name in pictures)
    assert status(run_dir)["state"] == "done"


# --- full ----------------------------------------------------------------------------------------


def test_full_while_a_checkpoint_is_written(images, truth, disk, tmp_path):
    """The first ones fit and stay; none that is half written is left."""
    disk.resize(truth, 2.5)
    config = settings(tmp_path, images, train={"save_steps": 1, "keep": 1000})
    job = Job(config, disk.path / "run")
    failed(job, "checkpoints/step-000000003: could not be written", "No space left on device")
    intact(job.run_dir, 1, 2)
    found = status(job.run_dir)
    assert (found["state"], "step-000000003" in found["reason"]) == ("failed", True)
    disk.resize(truth, 100)
    goes_on(config, job.run_dir, truth)


def test_full_with_two_ranks(images, truth, disk, tmp_path):
    """Rank 0, which writes, speaks for both; then both go on to the end."""
    disk.resize(truth, 2.5)
    config = settings(tmp_path, images, train={"save_steps": 20, "keep": 1000})
    job = Job(config, disk.path / "run", ranks=2)
    failed(job, "checkpoints/step-000000040: could not be written", "No space left on device")
    intact(job.run_dir, 20, 30)
    disk.resize(truth, 100)
    Job(config, job.run_dir, ranks=2).finish()
    intact(job.run_dir, 20, 30, 40, STEPS)
    assert status(job.run_dir)["state"] == "done"


def test_full_while_metrics_are_written(images, truth, disk, tmp_path):
    """A half line is no obstacle to going on."""
    config = settings(tmp_path, images)
    job = Job(config, disk.path / "run")
    stopped_at(job, job.run_dir / "checkpoints" / f"step-{BATCHES:09d}")
    disk.fill()
    job.signal(signal.SIGCONT)
    failed(job, "run/metrics.jsonl: could not be written", "No space left on device")
    intact(job.run_dir, BATCHES)
    disk.make_room()
    goes_on(config, job.run_dir, truth)


@pytest.mark.parametrize("file", ["unfinished-", "examples.safetensors", "results.jsonl"])
def test_full_while_the_evaluation_is_written(file, images, truth, disk, tmp_path):
    """The weights are safe; the same command measures them and writes what is missing."""
    config = settings(tmp_path, images)
    job = Job(config, disk.path / "run")
    stopped_at(job, job.run_dir / "model.safetensors")
    pictures = pages_of(truth / "examples.safetensors")
    # What is measured so far takes a page.
    left = {"unfinished-": 0, "examples.safetensors": pictures, "results.jsonl": pictures + 1}
    disk.fill(pages_left=left[file])
    job.signal(signal.SIGCONT)
    failed(job, f"run/{file}", "could not be written", "No space left on device")
    assert weights_hash(job.run_dir) == weights_hash(truth)
    intact(job.run_dir, BATCHES, STEPS)
    assert [line["attack"] for line in lines(job.run_dir / "results.jsonl")] == []
    disk.make_room()
    goes_on(config, job.run_dir, truth)


# --- refusing ------------------------------------------------------------------------------------


def half_of(truth: Path, run_dir: Path) -> None:
    """What is there when the run is killed in its second epoch."""
    shutil.copytree(truth, run_dir)
    for name in ("model.safetensors", "results.jsonl", "examples.safetensors", ".lock"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:09d}")


def test_limit_while_a_checkpoint_and_the_final_weights_are_written(images, truth, tmp_path):
    """The final weights say more about themselves than a checkpoint's, so either can be cut."""
    size = (truth / "checkpoints" / f"step-{STEPS:09d}" / "model.safetensors").stat().st_size
    assert size < (truth / "model.safetensors").stat().st_size
    config, run_dir = settings(tmp_path, images), tmp_path / "run"
    half_of(truth, run_dir)
    job = Job(config, run_dir, prepare=partial(limited, size - 1))
    failed(job, f"checkpoints/step-{STEPS:09d}: could not be written", "File too large")
    intact(run_dir, BATCHES)
    job = Job(config, run_dir, prepare=partial(limited, size))
    failed(job, "run/model.safetensors: could not be written", "File too large")
    intact(run_dir, BATCHES, STEPS)
    assert not (run_dir / "model.safetensors").exists()
    goes_on(config, run_dir, truth)


def test_limit_while_the_log_is_written(images, truth, tmp_path):
    """A log that fails is no traceback of Python's logging."""
    config, run_dir = settings(tmp_path, images), tmp_path / "run"
    half_of(truth, run_dir)
    with (run_dir / "log.txt").open("a") as log:
        log.write("\n" * 2_000_000)  # larger than any checkpoint
    job = Job(config, run_dir, prepare=partial(limited, 1_500_000))
    failed(job, "run/log.txt: could not be written", "File too large")
    (run_dir / "log.txt").unlink()
    goes_on(config, run_dir, truth)


def test_disk_that_becomes_read_only(images, truth, disk, tmp_path):
    """In the midst of a run, as a disk with errors does; and one that is so from the start."""
    config = settings(tmp_path, images)
    job = Job(config, disk.path / "run")
    stopped_at(job, job.run_dir / "checkpoints" / f"step-{BATCHES:09d}")
    # The run has files open, so the disk itself cannot be; every file opened from now on is on a
    # read-only view of it.
    assert mount("--bind", job.run_dir, job.run_dir)
    assert mount("-o", "remount,bind,ro", job.run_dir)
    job.signal(signal.SIGCONT)
    failed(job, "run/metrics.jsonl: could not be written", "Read-only file system")
    intact(job.run_dir, BATCHES)
    with pytest.raises(UserError, match=r"cannot be a run folder .Read-only file system"):
        train_run(load_config(config), job.run_dir, "auto")
    assert subprocess.run(["umount", job.run_dir]).returncode == 0
    goes_on(config, job.run_dir, truth)


@pytest.mark.parametrize("pages_left", [0, 1])
def test_still_full(pages_left, images, truth, disk, tmp_path, monkeypatch, capsys):
    """Who starts the run again without making room is told the same again, whatever fails."""
    monkeypatch.setattr("dist_adv.distributed.stopping.catch_signals", lambda: None)
    config = settings(tmp_path, images)
    run_dir = disk.path / "run"
    half_of(truth, run_dir)
    disk.fill(pages_left)
    assert cli._run(["train", str(config), "--run-dir", str(run_dir)]) == 1
    said = capsys.readouterr()
    complaints = [line for line in said.err.splitlines() if line.startswith("dist-adv: ")]
    assert len(complaints) == 1, said.err
    assert str(run_dir) in complaints[0]
    assert "No space left on device" in complaints[0]
    assert "Traceback" not in said.err
    intact(run_dir, BATCHES)
    disk.make_room()
    goes_on(config, run_dir, truth)


# --- dashboards ----------------------------------------------------------------------------------


def tracked(path: Path, images: Path, mode: str) -> Path:
    return settings(path, images, track={"wandb": {"mode": mode}})


def nobody_is_logged_in(path: Path) -> dict[str, str]:
    return {"HOME": str(path), "WANDB_API_KEY": "", "WANDB_SILENT": "true"}


def test_server_out_of_reach(images, truth, tmp_path):
    """A warning, and an offline run that can be sent later; training is as it was."""
    config = tracked(tmp_path, images, "online")
    # W&B tries for half a minute otherwise, whatever WANDB_INIT_TIMEOUT says.
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_X_GRAPHQL_RETRY_MAX": "1"}
    key = {"WANDB_API_KEY": "0123456789" * 4}
    job = Job(config, tmp_path / "run", env={**nobody_is_logged_in(tmp_path), **server, **key})
    job.finish()
    for said in (job.output(), (job.run_dir / "log.txt").read_text()):
        (line,) = (line for line in said.splitlines() if "W&B is out of reach" in line)
        assert line.endswith(f"recording offline in {job.run_dir}/wandb")
    assert "Traceback" not in job.output()
    (recorded,) = job.run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert recorded.stat().st_size > 10_000  # sixty lines of metrics
    whole(job.run_dir, truth)


def helpers(pid: int) -> list[int]:
    """The processes of W&B below a process."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        name = Path(f"/proc/{child}/comm").read_text().strip()
        found += [int(child)] if name.startswith("wandb") else helpers(int(child))
    return found


def test_helper_of_the_dashboard_is_killed(images, truth, tmp_path):
    """In the midst of training, which goes on to its end; what was measured is in the files."""
    config = tracked(tmp_path, images, "offline")
    job = Job(config, tmp_path / "run", env=nobody_is_logged_in(tmp_path))
    stopped_at(job, job.run_dir / "checkpoints" / f"step-{BATCHES:09d}")
    found = helpers(job.process.pid)
    assert found, "no helper of W&B to kill"
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    job.signal(signal.SIGCONT)
    job.finish()
    assert OURS not in job.output()
    assert len(lines(job.run_dir / "metrics.jsonl")) == len(ALL_METRICS)
    whole(job.run_dir, truth)
