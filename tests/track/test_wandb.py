"""What a dashboard gets is what the run folder has: read back from W&B's own offline file."""

import json
from pathlib import Path

import pytest

import cases
from dist_adv import track
from dist_adv.config import parse_config
from dist_adv.errors import UserError
from dist_adv.runner import train_run
from wandb_file import history, pieces, records, settings, summary


def tracked(images: Path, **track: object):
    tree = cases.config("fast-random", "batch", images)
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
    assert found["threat"] == {"norm": "linf", "eps": 0.1}
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


@pytest.mark.slow
def test_unreachable_server_means_a_warning_and_an_offline_run(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    run_dir = tmp_path / "run"
    train_run(tracked(images, wandb={"mode": "online"}), run_dir, "none")
    assert (run_dir / "model.safetensors").exists()
    assert list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert "W&B is out of reach" in (run_dir / "log.txt").read_text()


def test_environment_variable_wins(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train_run(tracked(images, wandb={"mode": "offline"}), tmp_path / "run", "none")
    assert not (tmp_path / "run" / "wandb").exists()


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


def test_tensorboard_that_is_not_installed(images, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = tracked(images, wandb={"mode": "disabled"}, tensorboard=True)
    with pytest.raises(UserError, match=r"track\.tensorboard"):
        track.check(config)
