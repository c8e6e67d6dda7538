"""Runs that an earlier version wrote: this one goes on with them, judges and exports them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_adv import cli, load_model
from dist_adv.runs.folder import RunFolder

WRITTEN = Path(__file__).parents[1] / "data" / "c59bfd6"


@pytest.fixture(params=["stopped", "finished"])
def run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunFolder:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return RunFolder(shutil.copytree(WRITTEN / request.param, tmp_path / request.param))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_goes_on_and_is_judged(run: RunFolder, tmp_path: Path) -> None:
    logged, evaluated = lines(run.metrics), run.results.exists()
    command = ["train", str(run.config), "--run-dir", str(run)]
    assert cli._run(command) == 0
    assert run.state == "done"
    if not evaluated:  # it was stopped at optimiser step 46 of 90
        assert "going on from" in run.log.read_text()
        assert lines(run.metrics)[: len(logged)] == logged
        assert lines(run.metrics)[-1]["step"] == 90
    figures = lines(run.results)
    assert [line["attack"] for line in figures] == ["natural", "pgd-2"]
    assert cli._run(["eval", str(run), "--attacks", "fgsm", "--limit", "20"]) == 0
    assert lines(run.results)[-1]["n"] == 20

    assert cli._run(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    assert "Free" in (tmp_path / "report" / "report.md").read_text()
    assert cli._run(["status", str(run)]) == 0
    assert cli._run(["export", str(run), "--out", str(tmp_path / "exported")]) == 0
    whole, exported = load_model(run.path), load_model(tmp_path / "exported")
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(whole(x), exported(x))


def test_it_is_made_longer(run: RunFolder) -> None:
    command = ["train", str(run.config), "train.epochs=2", "eval.attacks=[]", "--run-dir", str(run)]
    assert cli._run(command) == 0
    assert lines(run.metrics)[-1]["step"] == 180
    assert load_model(run.path).architecture["trained"]["step"] == 180
