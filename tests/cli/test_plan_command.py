"""`dist-adv plan` as it is typed, and the records that it reads as they are written."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

import forked
from dist_adv import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits" / "fast.yaml")
SMALL = [DIGITS, "model.width=4", "train.batch_size=16"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def call(*command: str, columns: int = 100) -> str:
    done = forked.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": str(columns)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_is_measured_here_is_read_elsewhere(tmp_path, capsys):
    plan = ["plan", *SMALL, "--gpus", "1,2,4", "--bandwidth", "12.5:14", "--json"]
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    call("-m", "dist_adv", *plan, str(here))
    measured = json.loads(here.read_text())
    assert [row["gpus"] for row in measured["plan"]] == [1, 2, 4]
    assert [row["what"].split(", ")[2] for row in measured["rows"]] == ["batch 4", "batch 16"]
    elsewhere = [*plan, str(there), "--step-times", str(here), "--price", "2"]
    assert cli._run(elsewhere) == 0
    read = json.loads(there.read_text())
    assert read.keys() == measured.keys()
    for row, again in zip(measured["plan"], read["plan"], strict=True):
        assert again == pytest.approx(row)
    printed = capsys.readouterr().out
    (cost,) = [line for line in printed.splitlines() if line.startswith("│ cost")]
    assert cost.split("│")[-2].strip() == f"{2 * measured['plan'][2]['gpu_hours']:.2f}"


def test_the_page_shows_what_is_printed():
    page = (ROOT / "docs" / "scaling.md").read_text()
    command, shown = re.search(
        r"```bash\ndist-adv (plan .*)\n```\n\n```\n(.*?)```", page, re.S
    ).groups()
    assert call("-m", "dist_adv", *command.split(), columns=80) == shown


def test_two_ranks_measure_the_link_between_them():
    """One of them prints, and no bandwidth was given."""
    printed = call("-m", *TORCHRUN, "dist_adv", "plan", *SMALL, "--gpus", "2,4")
    printed = " ".join(printed.split())
    assert printed.count("Step time of one GPU") == 1
    assert "All-reduce: a ring of all GPUs, " in printed
    assert "on CPUs the same cores compute and send" in printed


def test_step_times_of_the_gpu_suite(tmp_path, capsys):
    suite = [str(ROOT / "benchmarks" / "gpu_suite.py"), "b", "--precision", "fp32", "--toy"]
    call(*suite, "--out", str(tmp_path))
    cifar = [str(ROOT / "configs" / "cifar10" / "free.yaml"), "model.width=4"]
    given = ["--step-times", str(tmp_path / "b.json"), "--bandwidth", "pcie3"]
    assert cli._run(["plan", *cifar, *given]) == 0
    assert "ms at 16 images (CPU, fp32" in capsys.readouterr().out


def test_scaling_at_toy_size():
    printed = call(str(ROOT / "benchmarks" / "scaling.py"), "--toy")
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    compared = {(line[0], line[1]) for line in lines if len(line) == 8}
    assert compared == {("| method", "processes")} | {
        (f"| {name}", "2") for name in ("natural", "Free")
    }
