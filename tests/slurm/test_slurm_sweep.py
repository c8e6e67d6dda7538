"""A sweep as a job array, with one of its runs stopped in the middle, and the report behind it."""

import re
import sys

import pytest
import yaml

from launch import SMALL, status, weights_hash
from slurm_cluster import DIGITS, reaches

pytestmark = pytest.mark.slow

EPOCH = 23 * 4  # optimiser steps
TWIN = {"train.epochs": 10}
SHORT = {"train.max_steps": 2}
SWEEP = {
    "base": str(DIGITS / "free.yaml"),
    "set": {
        **{f"model.{key}": value for key, value in SMALL.items()},
        **{"eval.attacks": ["natural"], "eval.every": 0},
    },
    "runs": [
        {"name": "stopped", "set": TWIN},
        {"name": "left-alone", "set": TWIN},
        {"name": "short", "set": SHORT},
        {"name": "shorter", "set": {"train.max_steps": 1}},
    ],
}


def test_an_array_of_four_runs_and_its_report(cluster, tmp_path):
    """Two at a time; the two that are alike come to the same weights though one is stopped."""
    (tmp_path / "four.yaml").write_text(yaml.safe_dump(SWEEP))
    command = (sys.executable, "-m", "dist_adv", "sweep", "four.yaml", "--out", "runs")
    slurm = (*command, "--slurm", "--limit", "2")

    dry = cluster.run(*slurm, "--dry-run", at=tmp_path)
    assert dry.returncode == 0, dry.stderr
    array, report = dry.stdout.splitlines()
    assert " --array=0-3%2 " in array
    assert array.endswith("/sweep.sbatch runs")
    assert " --dependency=afterany:ARRAY " in report
    assert report.endswith("/report.sbatch runs")
    assert not (tmp_path / "runs").exists()

    submitted = cluster.run(*slurm, at=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    job = (tmp_path / "runs" / "slurm_job").read_text().strip()
    numbers = re.findall(r"^job (\d+): ", submitted.stdout, re.MULTILINE)
    assert numbers[0] == job
    report = numbers[1]
    assert cluster.job(job, "ArrayTaskThrottle") == "2"

    again = cluster.run(*slurm, at=tmp_path)
    assert again.returncode == 2
    assert again.stderr.endswith(
        f"dist-adv: runs: job {job} of this sweep is still in the queue; wait for it, "
        f"or scancel {job}\n"
    )

    stopped = tmp_path / "runs" / "stopped"
    reaches(stopped, 2 * EPOCH)
    # By its own number: where an array's is refused for the moment, scancel tries again for as long
    # as ten seconds, and kills the task that has just come back.
    task = cluster.job(f"{job}_0", "JobId")
    cluster.ask("scancel", "--batch", "--signal=USR1", task)
    cluster.wait_for(f"{job}_0", "RUNNING", starts=2)
    assert status(stopped)["state"] in ("preempted", "running")

    cluster.wait_for(report, "COMPLETED")
    names = [run["name"] for run in SWEEP["runs"]]
    states = [status(tmp_path / "runs" / name)["state"] for name in names]
    assert states == ["done"] * 4, cluster.told(job)
    assert weights_hash(stopped) == weights_hash(tmp_path / "runs" / "left-alone")
    text = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert all(name in text for name in names)
    assert "stopped; back to the queue" in (tmp_path / "runs/logs/stopped.txt").read_text()
    table = cluster.run(sys.executable, "-m", "dist_adv", "status", "runs", at=tmp_path)
    assert table.stdout.count("done") == 4, table.stdout
