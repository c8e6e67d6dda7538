"""`launch/slurm/report.sbatch` with further attacks, run as a script with the variables of a job.

`tests/slurm` submits it to a cluster, without attacks.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dist_adv.config import load_config
from dist_adv.training.run import train_run
from launch import TINY
from slurm_cluster import DIGITS, SCRIPTS, SITE

pytestmark = pytest.mark.slow

JOB = {
    **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "1"},
    **{"DIST_ADV_SLURM": str(SCRIPTS), "DIST_ADV_SITE": "site.sh", "RANKS": "1"},
}


def report(at: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (at / "site.sh").write_text(SITE)
    return subprocess.run(
        ["bash", str(SCRIPTS / "report.sbatch"), *arguments],
        cwd=at,
        env=os.environ | JOB,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_further_attacks_on_each_run_that_is_finished(tmp_path: Path) -> None:
    runs = [tmp_path / "sweep" / name for name in ("alder", "birch", "cedar")]
    train_run(load_config(DIGITS / "fast.yaml", TINY), runs[0], "none")
    shutil.copytree(runs[0], runs[1])
    shutil.copytree(runs[0], runs[2])
    (runs[2] / "model.safetensors").unlink()
    done = report(tmp_path, "sweep", "--attacks", "fgsm", "--limit", "50")
    assert done.returncode == 0, done.stderr
    measured = [
        [(line["attack"], line["n"]) for line in map(json.loads, path.open())]
        for path in (run / "results.jsonl" for run in runs)
    ]
    assert measured == [[("natural", 359), ("fgsm", 50)]] * 2 + [[("natural", 359)]]
    page = (tmp_path / "sweep" / "report" / "report.md").read_text()
    assert "Under FGSM (50 images)" in page
    assert [name in page for name in ("alder", "birch", "cedar")] == [True, True, False]


def test_an_evaluation_that_fails_ends_the_job(tmp_path: Path) -> None:
    """Slurm shows it as failed then; its log says why."""
    (tmp_path / "sweep" / "one").mkdir(parents=True)
    none = report(tmp_path, "sweep", "--attacks", "fgsm")
    assert none.returncode == 2
    assert "sweep: no run of it is finished; see the logs of its jobs" in none.stderr
    (tmp_path / "sweep" / "one" / "model.safetensors").touch()
    damaged = report(tmp_path, "sweep", "--attacks", "fgsm")
    assert damaged.returncode == 2
    assert "dist-adv: sweep/one: is no run folder" in damaged.stderr
    assert not (tmp_path / "sweep" / "report").exists()
