"""A run that dies between two passes and goes on ends with the weights of one that did not."""

import json
from pathlib import Path

import pytest
import torch

from cases import CASES, config
from dist_adv import checkpoint, load_model
from dist_adv.config import Config, parse_config
from dist_adv.errors import UserError
from dist_adv.runner import train_run
from dist_adv.train import Trainer


class Killed(BaseException):
    """Nothing catches this, as nothing catches SIGKILL."""


def settings(case: str, images: Path, **train: object) -> Config:
    tree = config(case, "batch", images)
    tree["train"] = {**tree["train"], "epochs": 3, **train}
    tree["method"] = {**tree["method"], "guard": "warn"}
    return parse_config(tree, case)


def train_and_die(
    monkeypatch: pytest.MonkeyPatch, number: int, config: Config, run_dir: Path
) -> None:
    """Train, and die right after the `number`-th checkpoint is complete."""
    saves = []
    save = checkpoint.save

    def save_and_die(*arguments: object) -> Path:
        path = save(*arguments)  # type: ignore[arg-type]
        saves.append(path)
        if len(saves) == number:
            raise Killed
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            train_run(config, run_dir, "auto")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_model(run_dir).state_dict()


@pytest.mark.parametrize("case", CASES)
def test_resumed_weights_are_those_of_the_uninterrupted_run(case, images, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_run(settings(case, images), whole, "none")
    for number in (1, 1):  # dies after the first pass, and again after the second
        train_and_die(monkeypatch, number, settings(case, images), parts)
    train_run(settings(case, images), parts, "auto")
    expected, found = weights(whole), weights(parts)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    guards = [_guards(run_dir) for run_dir in (whole, parts)]
    assert guards[0] == guards[1]


def _guards(run_dir: Path) -> dict[float, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["epoch"]: r["guard_accuracy"] for r in records if r["kind"] == "epoch"}


def test_saving_and_evaluating_do_not_change_training(images, tmp_path):
    """The run with a curve every pass and the run without one give the same bits."""
    plain = settings("fast-random", images)
    tree = plain.model_dump()
    tree["eval"] |= {"every": 1, "curve_limit": 4}
    train_run(plain, tmp_path / "plain", "none")
    train_run(parse_config(tree, "curves"), tmp_path / "curves", "none")
    expected, found = weights(tmp_path / "plain"), weights(tmp_path / "curves")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_path_starts_another_run(images, tmp_path):
    train_run(settings("free", images), tmp_path / "one", "none")
    first = sorted((tmp_path / "one" / "checkpoints").iterdir())[0]
    train_run(settings("free", images), tmp_path / "two", str(first))
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_finished_run_is_not_trained_again(images, tmp_path):
    run_dir = tmp_path / "run"
    train_run(settings("natural", images), run_dir, "auto")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    train_run(settings("natural", images), run_dir, "auto")
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(images, tmp_path, monkeypatch, caplog):
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    train_run(settings("free", images), whole, "none")
    train_and_die(monkeypatch, 2, settings("free", images), run_dir)
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    damaged = newest / "method.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    monkeypatch.setattr("dist_adv.progress.log.propagate", True)
    train_run(settings("free", images), run_dir, "auto")
    assert f"passed over: {newest}" in caplog.text
    expected, found = weights(whole), weights(run_dir)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_no_good_checkpoint_is_an_error_and_not_a_fresh_start(images, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    train_and_die(monkeypatch, 2, settings("free", images), run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of its 2 checkpoints is good"):
        train_run(settings("free", images), run_dir, "auto")


class Collapsing:
    """Stands in for `guard.robust_accuracy`: rises, then falls by more than the rule allows."""

    def __init__(self) -> None:
        self.values = iter([0.4, 0.5, 0.2, 0.9])

    def __call__(self, *arguments: object) -> float:
        return next(self.values)


@pytest.mark.parametrize(("mode", "passes"), [("none", 4), ("warn", 4), ("stop", 2)])
def test_the_guard_stops_with_the_last_good_weights(mode, passes, images, tmp_path, monkeypatch):
    monkeypatch.setattr("dist_adv.train.robust_accuracy", Collapsing())
    tree = settings("fast-random", images, epochs=4).model_dump()
    tree["method"]["guard"] = mode
    kept: dict[float, dict[str, torch.Tensor]] = {}
    curve = Trainer._curve

    def remember(self: Trainer, session: object) -> dict:
        record = curve(self, session)
        kept[self.passes] = {k: v.clone() for k, v in self.copy.state_dict().items()}
        return record

    monkeypatch.setattr(Trainer, "_curve", remember)
    train_run(parse_config(tree, mode), tmp_path / "run", "none")
    model = load_model(tmp_path / "run")
    assert model.architecture["trained"]["epoch"] == passes
    found = model.state_dict()
    assert all(torch.equal(found[name], kept[passes][name]) for name in found)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert ("catastrophic overfitting in pass 3" in log) == (mode != "none")


def test_a_run_goes_on_from_images_on_disk(images, tmp_path):
    """Where the images are, in memory or read as they are used, changes no bit of the weights."""
    tree = config("free", "batch", images)
    tree["train"] |= {"save_steps": 1, "keep": 100}
    train_run(parse_config(tree, "free"), tmp_path / "memory", "none")
    tree["data"] |= {"resident_gb": 0, "workers": 2}
    middle = sorted((tmp_path / "memory" / "checkpoints").iterdir())[1]
    train_run(parse_config(tree, "free"), tmp_path / "disk", str(middle))
    expected, found = (load_model(tmp_path / name).state_dict() for name in ("memory", "disk"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
