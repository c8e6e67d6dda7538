"""What a dashboard gets is what the run folder has: read back from W&B's own offline file."""

import importlib
import json
from pathlib import Path

import pytest

import cases
from dist_adv.config import Config, parse_config
from dist_adv.errors import RunFailure, UserError
from dist_adv.runs.folder import RunFolder
from dist_adv.tracking.tracker import Tracker, check_tracking
from dist_adv.tracking.wandb_run import identity
from dist_adv.training.run import train_run
from wandb_file import history, pieces, records, settings, summary


def tracked(images: Path, **track: object):
    tree = cases.config("fast-random", "batch", images, small=True)
    tree["eval"] = {"attacks": ["natural", "pgd-2"], "every": 1, "curve_attack": "pgd-1"}
    tree["train"] = {**tree["train"], "log_every": 1}
    return parse_config({**tree, "track": track}, "tracked")


@pytest.mark.slow
def test_offline_run_holds_every_metric_once(images, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody is logged in
    run_dir = tmp_path / "run"
    wandb = {
        "mode": "auto",
        "project": "p",
        "name": "n",
        "group": "g",
        "tags": ["a", "b"],
        "notes": "why",
    }
    train_run(tracked(images, wandb=wandb), run_dir, "none")
    (path,) = pieces(run_dir)
    (run,) = [record.run for record in records(path) if record.HasField("run")]
    assert (run.project, run.display_name, run.run_group) == ("p", "n", "g")
    assert (run.job_type, run.notes) == ("train", "why")
    assert set(run.tags) == {"a", "b"}
    assert run.git.commit
    found = settings(path)
    assert found["method"]["name"] == "fast"
    assert found["threat"] == {"norm": "linf", "eps": 0.1, "warmup": 0.0}
    assert found["env"] == json.loads((run_dir / "env.json").read_text())
    assert [r for r in records(path) if r.HasField("stats")]  # of the system

    rows = history(path)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for kind, shown in (("train", "loss"), ("epoch", "pgd_accuracy")):
        logged = [(row["step"], row[f"{kind}/{shown}"]) for row in rows if f"{kind}/{shown}" in row]
        assert logged == [(line["step"], line[shown]) for line in lines if line["kind"] == kind]
    assert len([line for line in lines if line["kind"] == "train"]) == 8

    results = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    for result in results:
        assert summary(path)[f"final/{result['attack']}"] == result["accuracy"]


VARIABLES = {
    "WANDB_PROJECT": "project of the environment",
    "WANDB_ENTITY": "team",
    "WANDB_NAME": "name",
    "WANDB_RUN_GROUP": "group",
    "WANDB_JOB_TYPE": "job",
    "WANDB_NOTES": "notes",
    "WANDB_TAGS": "one,two",
    "WANDB_RUN_ID": "abc",
}


def test_environment_goes_before_the_configuration(images, tmp_path, monkeypatch):
    """But the id of a run that goes on; and what was pushed later is as it was at the start."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    said = {"project": "p", "entity": "e", "name": "n", "group": "g", "tags": ["t"]}
    config, run_dir = tracked(images, wandb=said), tmp_path / "run"
    run_dir.mkdir()
    expected = {
        "project": "project of the environment",
        "entity": "team",
        "name": "name",
        "group": "group",
        "job_type": "job",
        "notes": "notes",
        "tags": ["one", "two"],
        "id": "abc",
        "started_from": None,
        "folder": str(run_dir),
    }
    assert identity(RunFolder(run_dir), config) == expected
    for name in VARIABLES:
        monkeypatch.delenv(name)
    assert identity(RunFolder(run_dir), config, keep=True) == expected
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    monkeypatch.setenv("WANDB_RUN_GROUP", "later")
    assert identity(RunFolder(run_dir), config, keep=True) == {**expected, "group": "later"}
    assert identity(RunFolder(run_dir), config, "of a checkpoint") == {
        **said,
        "job_type": "train",
        "notes": None,
        "group": "later",
        "id": "abc",
        "started_from": None,
        "folder": str(run_dir),
    }


def test_id_of_a_checkpoint_is_gone_on_with(images, tmp_path):
    config = tracked(images, wandb={})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert identity(RunFolder(tmp_path / "a"), config, "of a checkpoint")["id"] == "of a checkpoint"
    fresh = identity(RunFolder(tmp_path / "b"), config)["id"]
    assert fresh
    assert identity(RunFolder(tmp_path / "b"), config, "of a checkpoint")["id"] == fresh


def test_disabled_by_the_environment(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train_run(tracked(images, wandb={"mode": "offline"}), tmp_path / "run", "none")
    assert not (tmp_path / "run" / "wandb").exists()


def alerts(run_dir: Path) -> list[tuple[str, str]]:
    (path,) = pieces(run_dir)
    found = [record.alert for record in records(path) if record.HasField("alert")]
    return [(alert.title, alert.text) for alert in found]


@pytest.mark.slow
def test_alerts(images, tmp_path, monkeypatch):
    """Of a collapse, of updates that were skipped, and of a run that fails."""
    # What the guard sees is always a collapse.
    monkeypatch.setattr("dist_adv.training.collapse.Measured.collapsed", lambda now, before: True)
    config, run_dir = tracked(images, wandb={"mode": "offline"}), tmp_path / "collapse"
    train_run(config, run_dir, "none")
    ((title, text),) = alerts(run_dir)
    assert title == "Catastrophic overfitting"
    assert text.startswith(f"{run_dir}, epoch 2: PGD-5 accuracy on training images fell to ")

    monkeypatch.setenv("FAULT", "nan:0:2")
    faulty = importlib.import_module("faulty")
    monkeypatch.setattr("dist_adv.training.learner.build_method", faulty.Faulty)
    tree = {**config.model_dump(), "method": {"name": "natural", "guard": "none"}}
    skip = {**tree, "train": {**tree["train"], "on_nan": "skip"}}
    train_run(parse_config(skip, "skip"), tmp_path / "skip", "none")
    path = tmp_path / "skip"
    assert alerts(path) == [
        ("Not finite", f"{path}, epoch 0.75: 1 updates skipped since this start")
    ]
    with pytest.raises(RunFailure) as failure:
        train_run(parse_config(tree, "stop"), tmp_path / "stop", "none")
    path = tmp_path / "stop"
    assert alerts(path) == [("Run failed", f"{path}: {failure.value}")]


@pytest.mark.slow
def test_evaluation_after_a_kill_is_of_the_same_run(images, tmp_path):
    """Training was over, and the results were not measured or not pushed yet."""
    config, run_dir = tracked(images, wandb={"mode": "offline"}), tmp_path / "run"
    train_run(config, run_dir, "none")
    (run_dir / "results.jsonl").unlink()
    train_run(config, run_dir, "auto")
    first, second = pieces(run_dir)
    assert first.name == second.name  # the id
    assert summary(second)["final/pgd-2"] == summary(first)["final/pgd-2"]
    assert {r.artifact.type for r in records(second) if r.HasField("artifact")} == {
        "model",
        "report",
    }


def test_name_that_wandb_does_not_take(images, tmp_path, monkeypatch, said):
    """Tracking is given up aloud, training is not."""
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    config = tracked(images, wandb={"mode": "offline"})
    tracker = Tracker(RunFolder(run_folder(tmp_path, config)), config)
    assert tracker.wandb is None
    assert "no W&B (Invalid project name" in said.text


def run_folder(path: Path, config: Config) -> Path:
    (path / "config.yaml").write_text(config.dump())
    (path / "env.json").write_text("{}")
    return path


def test_tensorboard_on_request(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    config = tracked(images, wandb={"mode": "disabled"}, tensorboard=True)
    train_run(config, run_dir, "none")
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses == pytest.approx(expected)
    results = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    for result in results:
        (event,) = events.Scalars(f"final/{result['attack']}")
        assert event.value == pytest.approx(result["accuracy"])
    assert [event.step for event in events.Images("epoch/examples")] == [4, 8]
    assert [event.step for event in events.Images("final/examples")] == [8]
    (text,) = events.Tensors("config/text_summary")
    assert b"name: fast" in text.tensor_proto.string_val[0]


def test_tensorboard_that_is_not_installed(images, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = tracked(images, wandb={"mode": "disabled"}, tensorboard=True)
    with pytest.raises(UserError, match=r"track\.tensorboard"):
        check_tracking(config)
