"""A run of two ranks, killed and stopped again and again, is one run on W&B."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dist_adv import cli
from dist_adv.errors import UserError
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.run import Run, read_runs
from dist_adv.tracking.wandb_run import named, place
from launch import SMALL, Job, status, write_config
from made_up_runs import make_run
from wandb_file import history, pieces, records, settings, summary

pytestmark = pytest.mark.slow

EPOCHS, STARTS = 8, 4


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Killed before its first checkpoint, killed after it, stopped, and then run to its end."""
    path = tmp_path_factory.mktemp("resumed")
    config = write_config(
        path / "run.yaml",
        "fast-random",
        images,
        model=SMALL,
        track={"wandb": {"mode": "offline", "group": "g"}},
        train={"epochs": EPOCHS, "log_every": 1},
        eval={"attacks": ["natural", "pgd-2"], "every": 1, "curve_attack": "pgd-1"},
    )
    folder = path / "run"
    # What is logged is on the disk at once, and not within a quarter of a minute.
    env = {"HOME": str(path), "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.01"}

    def lines() -> int:
        file = folder / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def killed(after: int, total: int) -> None:
        """Rank 0 hangs in the step after `after` of this start; then all is killed."""
        fault = {"FAULT": f"sleep:0:{after + 1}"}
        job = Job(config, folder, 2, module="faulty", env=env | fault)
        assert job.wait_until(lambda: lines() == total)
        job.kill()

    killed(2, total=2)
    assert not (folder / "checkpoints").exists()
    killed(6, total=2 + 6 + 1)
    stopped = Job(config, folder, 2, env=env)
    assert stopped.wait_for_checkpoint(8)
    stopped.signal(signal.SIGTERM)
    stopped.wait()
    assert status(folder)["state"] == "preempted", stopped.output()
    Job(config, folder, 2, env={"HOME": str(path)}).finish()
    (found,) = read_runs([folder])
    assert len(found.epochs) == EPOCHS
    return found


def rows_of(files: list[Path]) -> dict[int, dict[str, Any]]:
    """By W&B's own step, of which it takes the first."""
    merged: dict[int, dict[str, Any]] = {}
    for path in files:
        for row in history(path):
            merged.setdefault(row["_step"], row)
    return merged


def check(rows: dict[int, dict[str, Any]], run: Run, but: tuple[str, ...] = ()) -> None:
    """Every line is a row, with all its numbers `but` those with these words in their names."""
    for line in run.metrics:
        row = rows[place(line["step"], line["kind"])]
        values = {
            name: value
            for name, value in named(line).items()
            if not any(word in name for word in but)
        }
        assert {name: row[name] for name in values} == values
        assert (row["step"], row["epoch"]) == (line["step"], line["epoch"])
    places = {place(line["step"], line["kind"]) for line in run.metrics}
    (examples,) = rows.keys() - places
    assert "final/examples/path" in rows[examples]


def test_pieces_are_of_one_run_and_overlap_without_harm(run: Run):
    files = pieces(run.folder)
    assert len(files) == STARTS  # and so none of rank 1
    ids = {record.run.run_id for path in files for record in records(path) if record.run.run_id}
    assert ids == {json.loads((run.folder / "wandb" / "run.json").read_text())["id"]}
    logged = [row["_step"] for path in files for row in history(path)]
    assert len(logged) > len(set(logged))  # else nothing is tested here
    # Of a step that was done twice the pieces have the first, the record the last.
    check(rows_of(files), run, but=("seconds", "per_s"))
    assert {settings(path)["env"]["world_size"] for path in files} == {2}
    preempting = [[r for r in records(path) if r.HasField("preempting")] for path in files]
    assert [len(found) for found in preempting] == [0, 0, 1, 0]


def test_images_of_every_evaluation(run: Run):
    rows = rows_of(pieces(run.folder)).values()
    shown = [row["epoch/examples/path"] for row in rows if "epoch/examples/path" in row]
    places = [place(line["step"], "epoch") for line in run.epochs]
    assert [int(path.split("examples_")[1].split("_")[0]) for path in shown] == places
    shown += [row["final/examples/path"] for row in rows if "final/examples/path" in row]
    assert len(shown) == EPOCHS + 1
    for path in shown:
        # Two starts may have drawn one picture.
        found = [*run.folder.glob(f"wandb/offline-run-*/files/{path}")]
        assert found
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in found)


def test_final_model_and_report_are_artifacts(run: Run):
    *before, last = pieces(run.folder)
    assert not [
        record for path in before for record in records(path) if record.HasField("artifact")
    ]
    check_artifacts(last, run)


def check_artifacts(path: Path, run: Run) -> None:
    found = {record.artifact.type: record.artifact for record in records(path)}
    files = {
        kind: {each.path: Path(each.local_path) for each in found[kind].manifest.contents}
        for kind in ("model", "report")
    }
    assert files["model"] == {
        name: run.folder / name for name in ("model.safetensors", "config.yaml")
    }
    assert {"report.html", "report.md", "results.csv"} < files["report"].keys()
    assert all(path.exists() for path in files["report"].values())
    results = json.loads(found["model"].metadata)["results"]
    assert results["final/pgd-2"] == run.evaluations["pgd-2"].accuracy


def test_sync_writes_one_whole_run(run: Run, tmp_path: Path, undrawn: None):
    result = CliRunner().invoke(cli.cli, ["sync", str(run.folder), "--offline", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = pieces(tmp_path / "run")
    (written,) = [record.run for record in records(path) if record.HasField("run")]
    assert (written.run_id, written.run_group) == (
        pieces(run.folder)[0].stem.removeprefix("run-"),
        "g",
    )
    rows = history(path)
    assert len(rows) == len(run.metrics) + 1
    check(rows_of([path]), run)
    check_artifacts(path, run)
    assert summary(path)["final/robust"] == run.evaluations["pgd-2"].accuracy
    assert len([row for row in rows if "epoch/examples/path" in row]) == EPOCHS


def test_sync_has_the_id_of_the_newest_checkpoint(run: Run, tmp_path: Path, undrawn: None):
    """Where `wandb/` is gone."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("wandb"))
    result = CliRunner().invoke(cli.cli, ["sync", str(folder), "--offline", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    (path,), known = pieces(tmp_path / "out" / "run"), RunFolder(run.folder).identity
    (written,) = [record.run for record in records(path) if record.HasField("run")]
    assert written.run_id == json.loads(known.read_text())["id"]


def test_one_id_for_many_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    for name in "ab":
        make_run(tmp_path / name)
    command = ["sync", str(tmp_path / "a"), str(tmp_path / "b"), "--offline", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.cli, command)
    assert isinstance(result.exception, UserError)
    assert "WANDB_RUN_ID: is the id of one run, and these are 2" in str(result.exception)
    assert not list(tmp_path.glob("*/wandb"))


def test_dashboard_shows_what_is_logged(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every name in the workspace and the report is one that this run has."""
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody is logged in
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out = tmp_path / "dashboard.json"
    result = CliRunner().invoke(cli.cli, ["dashboard", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "not saved to W&B" in result.output
    files = pieces(run.folder)
    logged = {name.removesuffix("/path") for path in files for row in history(path) for name in row}
    final, config = summary(files[-1]), settings(files[-1])
    for view in json.loads(out.read_text()).values():
        found = list(names(view))
        assert {"epoch/pgd_accuracy", "summary:final/robust", "final/examples"} < set(found)
        for name in found:
            if name.startswith("summary:"):
                assert name.removeprefix("summary:") in final
            elif "." in name:  # of the configuration
                section, value, key = name.split(".")
                assert value == "value"
                assert key in config[section]
            else:
                assert name in logged, name


def names(view: Any) -> Iterator[str]:
    """What panels, groups and filters refer to; not the default axis, which is W&B's counter."""
    if isinstance(view, list):
        for each in view:
            yield from names(each)
    elif isinstance(view, dict):
        for key, value in view.items():
            if key in ("metrics", "mediaKeys"):
                yield from value
            elif key in ("xAxis", "yAxis") and value != "_step":
                yield value
            elif key in ("grouping", "filters") and isinstance(value, list):
                yield from (each.get("key", each)["name"] for each in value)
            else:
                yield from names(value)
