"""A run that dies between two epochs and goes on ends with the weights of one that did not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cases import config
from dist_adv import load_model
from dist_adv.config import Config, parse_config
from dist_adv.errors import UserError
from dist_adv.runs import checkpoint
from dist_adv.training import learner
from dist_adv.training.collapse import Measured
from dist_adv.training.run import train_run
from dist_adv.training.trainer import Trainer


class Killed(BaseException):
    """Nothing catches this, as nothing catches SIGKILL."""


def settings(case: str, images: Path, **train: object) -> Config:
    tree = config(case, "batch", images, small=True)
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


# With what is carried on, and with the guard; test_any_step goes on with every method.
@pytest.mark.parametrize("case", ["free", "fast-previous", "fast-random"])
def test_resumed_weights_are_those_of_the_uninterrupted_run(case, images, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_run(settings(case, images), whole, "none")
    for number in (1, 1):  # dies after the first epoch, and again after the second
        train_and_die(monkeypatch, number, settings(case, images), parts)
    train_run(settings(case, images), parts, "auto")
    expected, found = weights(whole), weights(parts)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    guards = [_guards(run_dir) for run_dir in (whole, parts)]
    assert guards[0] == guards[1]
    assert all("guard_alignment" in each for each in guards[0].values())


def _guards(run_dir: Path) -> dict[float, dict[str, float | bool]]:
    """What the guard found after each epoch; of an epoch that was closed twice the last."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {
        record["epoch"]: {key: record[key] for key in record if key.startswith("guard_")}
        for record in records
        if record["kind"] == "epoch"
    }


def test_saving_and_evaluating_do_not_change_training(images, tmp_path):
    """The run with a curve every epoch and the run without one give the same bits."""
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


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(images, tmp_path, monkeypatch, said):
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    train_run(settings("free", images), whole, "none")
    train_and_die(monkeypatch, 2, settings("free", images), run_dir)
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    damaged = newest / "method.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train_run(settings("free", images), run_dir, "auto")
    assert f"passed over: {newest}" in said.text
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
    """Stands in for `collapse.on_sample`: PGD-5 rises, then falls while FGSM accuracy stays."""

    def __init__(self) -> None:
        self.values = iter([(0.4, 0.5), (0.5, 0.5), (0.2, 0.5), (0.9, 0.9)])

    def __call__(self, *arguments: object) -> Measured:
        return Measured(512, *next(self.values), chance=0.1)


@pytest.mark.parametrize(("mode", "epochs"), [("none", 4), ("warn", 4), ("stop", 2)])
def test_the_guard_stops_with_the_last_good_weights(mode, epochs, images, tmp_path, monkeypatch):
    monkeypatch.setattr("dist_adv.training.collapse.on_sample", Collapsing())
    tree = settings("fast-random", images, epochs=4).model_dump()
    tree["method"]["guard"] = mode
    kept: dict[float, dict[str, torch.Tensor]] = {}
    point = Trainer.point

    def remember(self: Trainer, session: object) -> dict:
        record, learner = point(self, session), self.learner
        kept[learner.epochs] = {k: v.clone() for k, v in learner.copy.state_dict().items()}
        return record

    monkeypatch.setattr(Trainer, "point", remember)
    train_run(parse_config(tree, mode), tmp_path / "run", "none")
    model = load_model(tmp_path / "run")
    assert model.architecture["trained"]["epoch"] == epochs
    found = model.state_dict()
    assert all(torch.equal(found[name], kept[epochs][name]) for name in found)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("catastrophic overfitting in epoch") == (mode != "none")
    assert ("catastrophic overfitting in epoch 3" in log) == (mode != "none")


@pytest.mark.parametrize("mode", ["warn", "stop"])
def test_a_resumed_run_compares_with_the_most_robust_pass_before(
    mode, images, tmp_path, monkeypatch
):
    """Killed between a slow collapse's epochs: neither fall alone is more than noise."""
    slow = {1.0: (0.5, 0.55), 2.0: (0.44, 0.56), 3.0: (0.35, 0.57)}

    def measured(self: Trainer, session: object) -> Measured:
        return Measured(512, *slow[self.learner.epochs], chance=0.1)

    monkeypatch.setattr(Trainer, "_measured", measured)
    tree = settings("fast-random", images).model_dump()
    tree["method"]["guard"] = mode
    config = parse_config(tree, mode)
    train_run(config, tmp_path / "whole", "none")
    train_and_die(monkeypatch, 2, config, tmp_path / "parts")
    train_run(config, tmp_path / "parts", "auto")
    for name in ("whole", "parts"):
        guards = _guards(tmp_path / name)
        assert [each["guard_tripped"] for each in guards.values()] == [False, False, True]
        trained = load_model(tmp_path / name).architecture["trained"]["epoch"]
        assert trained == (2 if mode == "stop" else 3)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_checkpoints_of_the_guard_before_this_one(images, tmp_path, monkeypatch):
    """They have the accuracy on one batch: a run goes on from them and compares afresh."""
    run_dir = tmp_path / "run"
    train_and_die(monkeypatch, 2, settings("fast-random", images), run_dir)
    newest = checkpoint.load(max((run_dir / "checkpoints").iterdir()))
    assert newest.state["guard"]
    state = {key: value for key, value in newest.state.items() if key != "guard"}
    older = replace(newest, state={**state, "guard_accuracy": 0.9})
    checkpoint.save(run_dir / "checkpoints", state["clock"]["step"], older, keep=1)
    train_run(settings("fast-random", images), run_dir, "auto")
    assert not any(each["guard_tripped"] for each in _guards(run_dir).values())


def test_adamw_goes_on_where_the_first_weights_stay(images, tmp_path, monkeypatch):
    """Which take no steps: the count of the others is what is kept."""
    build = learner.build_model

    def first_layer_stays(*arguments: object, **options: object) -> torch.nn.Module:
        model = build(*arguments, **options)
        next(model.parameters()).requires_grad_(False)
        return model

    monkeypatch.setattr(learner, "build_model", first_layer_stays)
    tree = config("adamw", "batch", images, small=True)
    tree["train"] |= {"save_steps": 1, "keep": 100}
    settings = parse_config(tree, "adamw")
    train_run(settings, tmp_path / "whole", "none")
    third = sorted((tmp_path / "whole" / "checkpoints").iterdir())[2]
    train_run(settings, tmp_path / "again", str(third))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_goes_on_from_images_on_disk(images, tmp_path):
    """Where the images are, in memory or read as they are used, changes no bit of the weights."""
    tree = config("free", "batch", images, small=True)
    tree["train"] |= {"save_steps": 1, "keep": 100}
    train_run(parse_config(tree, "free"), tmp_path / "memory", "none")
    tree["data"] |= {"resident_gb": 0, "workers": 2}
    middle = sorted((tmp_path / "memory" / "checkpoints").iterdir())[1]
    train_run(parse_config(tree, "free"), tmp_path / "disk", str(middle))
    expected, found = (load_model(tmp_path / name).state_dict() for name in ("memory", "disk"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
