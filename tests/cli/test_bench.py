"""`dist-adv bench` at toy size: every case runs and is written down. Its figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import forked
from dist_adv.config import parse_config
from dist_adv.plan.measure import Images
from dist_adv.plan.record import read_step_times

pytestmark = pytest.mark.slow


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_adv", "bench", "--quick", "--width", "4"]
    return forked.run(
        [*command, "--batch-size", "8", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_every_case_leaves_rows(tmp_path):
    cases = ["steps", "evaluation", "data", "engine", "overhead", "ranks", "startup", "art"]
    done = bench("--only", ",".join(cases), "--out", str(tmp_path))
    assert done.returncode in (0, 1), done.stderr[-3000:]  # 1: a bar missed on a slow machine
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(dict.fromkeys(row["case"] for row in found["rows"])) == cases
    steps = [row for row in found["rows"] if row["case"] == "steps"]
    assert len(steps) == 4
    model = {"name": "preact_resnet18", "width": 4}
    fast = parse_config({"method": {"name": "fast"}, "model": model}, "test")
    points, _ = read_step_times(tmp_path / "bench.json", fast, Images(50_000, 3, (32, 32), 10))
    assert list(points) == [8]
    assert all(row["details"]["ratio"][0] > 0 and row["met"] is None for row in steps)
    (reduced,) = [row for row in found["rows"] if "all-reduces" in row["what"]]
    assert reduced["met"], reduced
    assert set(reduced["details"]["reduced_times"]) == {"natural", "PGD-7", "Free", "Fast"}
    page = (tmp_path / "bench.md").read_text()
    assert all(row["what"] in page for row in found["rows"])


def test_a_case_that_cannot_be_run_says_why(tmp_path):
    missing = str(tmp_path / "nothing")
    done = bench("--only", "robust", "--data", missing, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert row["measured"].startswith("not measured: ")
    assert "data.root" in row["measured"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "step"], "--only: 'step' is no case; use peaks, steps"),
        (["--only", "peaks", "--out", str(Path(__file__))], "is not a folder"),
    ],
)
def test_bad_arguments(arguments, said):
    done = bench(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.shares
@pytest.mark.parametrize("part", ["a", "c", "e"])
def test_gpu_suite_at_toy_size(part, tmp_path_factory):
    out = tmp_path_factory.getbasetemp() / "gpu-suite"  # part e attacks the model of part c
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"
    done = forked.run(
        [sys.executable, str(script), part, "--toy", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / f"{part}.json").read_text())
    assert found["toy"] is True
    assert found["rows"]


def test_gpu_suite_goes_on_with_the_rows_that_are_missing(tmp_path):
    """Here one is there that nobody measured; and rows of another machine are not mixed in."""
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"
    command = [sys.executable, str(script), "a", "--toy", "--out", str(tmp_path)]
    how = {"capture_output": True, "text": True, "timeout": 300}
    assert forked.run(command, **how).returncode == 0
    found = json.loads((tmp_path / "a.json").read_text())
    names = [row["what"] for row in found["rows"]]
    found["rows"][0]["rate"] = 1234.5
    missing = found["rows"].pop()
    (tmp_path / "a.json").write_text(json.dumps(found))
    assert forked.run(command, **how).returncode == 0
    again = json.loads((tmp_path / "a.json").read_text())
    assert [row["what"] for row in again["rows"]] == names
    assert again["rows"][0]["rate"] == 1234.5
    assert again["rows"][-1]["what"] == missing["what"]
    (tmp_path / "a.json").write_text(json.dumps(found | {"hardware": "another GPU"}))
    done = forked.run(command, **how)
    assert done.returncode == 1
    assert "has rows of hardware another GPU, and here it is CPU" in done.stderr
