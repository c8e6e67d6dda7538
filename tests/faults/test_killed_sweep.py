"""A sweep that is stopped, killed and started again, with a run in it that cannot work."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import forked
from dist_adv.runs.run import read_runs
from launch import SMALL, status, weights_hash

pytestmark = pytest.mark.slow

DIGITS = Path(__file__).parents[2] / "configs" / "digits"
SWEEP = f"""
base: {DIGITS}/free.yaml
set:
  model: {SMALL}
  eval: {{every: 0, attacks: [natural]}}
  train: {{save_steps: 20, keep: 100}}
runs:
  - {{name: short, set: {{train.max_steps: 20}}}}
  - {{name: long, set: {{train.max_steps: 400}}}}
  - {{name: bad, set: {{data.name: imagefolder, data.root: nowhere}}}}
"""


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dist_adv", "sweep", "mine.yaml", *arguments]
    return forked.Popen(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(seen: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.002)


def newest(run_dir: Path) -> int:
    """The step of the newest checkpoint."""
    steps = [int(path.name.split("-")[1]) for path in (run_dir / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def test_stopped_killed_and_started_again(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SWEEP)
    truth = start(tmp_path, "--out", "truth", "--only", "long")
    assert truth.wait(120) == 0, truth.communicate()

    out = tmp_path / "runs/mine"
    sweep = start(tmp_path, "--jobs", "2")
    wait_until(lambda: newest(out / "long") >= 20 and (out / "short/model.safetensors").exists())
    wait_until(lambda: status(out / "short")["state"] == "done")
    sweep.terminate()
    said, complaints = sweep.communicate(timeout=120)
    assert sweep.returncode == 143, complaints
    assert complaints.splitlines()[-1].startswith("dist-adv: stopped (SIGTERM); the same command ")
    found = status(out / "long")
    assert (found["state"], found["reason"]) == ("preempted", "SIGTERM")
    before = newest(out / "long")

    sweep = start(tmp_path)
    wait_until(lambda: newest(out / "long") > before)
    sweep.kill()  # its run sees that, stops, and may not be through with it when the next comes
    sweep.communicate()
    short = (out / "short/log.txt").read_bytes(), (out / "logs/short.txt").read_bytes()

    sweep = start(tmp_path)
    said, complaints = sweep.communicate(timeout=240)
    assert sweep.returncode == 1, complaints
    last = complaints.splitlines()[-1]
    assert last.startswith(
        "dist-adv: 1 of 3 runs are not done (bad failed: data.root: nowhere/train "
    )
    assert "Traceback" not in complaints
    assert weights_hash(out / "long") == weights_hash(tmp_path / "truth/long")
    assert (out / "long/log.txt").read_text().count("going on from ") == 2
    assert ((out / "short/log.txt").read_bytes(), (out / "logs/short.txt").read_bytes()) == short
    assert said == "report: runs/mine/report/report.html\n"
    report = (out / "report/report.md").read_text()
    assert all(run.label in report for run in read_runs([out / "short", out / "long"]))
    assert not (out / "bad").exists()
