"""A run folder has one writer, says what became of it, and is gone on with only by its own run."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import config as case
from dist_adv import files
from dist_adv.config import Config, differences, longer, parse_config, training_differences
from dist_adv.data import Dataset
from dist_adv.errors import RunFailure, UserError
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.methods.registry import own_methods
from dist_adv.runs import checkpoint, claim
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.lock import Lock
from dist_adv.training.run import train_run
from dist_adv.training.trainer import Surroundings, Trainer

# --- one writer ----------------------------------------------------------------------------------


def in_use(run_dir: Path) -> bool:
    """Asked by a program that knows nothing of dist_adv."""
    return subprocess.run(["flock", "-n", run_dir / ".lock", "true"]).returncode == 1


@contextmanager
def holder(run_dir: Path) -> Iterator[int]:
    """The id of another process that holds the lock and does nothing else."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kept = Lock(run_dir)
            os.write(write, b"!")
            time.sleep(60)
            kept.release()
        finally:
            os._exit(0)
    assert os.read(read, 1) == b"!"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


def test_second_holder_is_refused_and_told_who(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*--run-dir"):
        Lock(tmp_path)
    assert in_use(tmp_path)
    lock.release()
    assert not in_use(tmp_path)
    again = Lock(tmp_path)
    with pytest.raises(UserError, match="in use"):
        Lock(tmp_path)
    again.release()


def test_another_process_is_seen(tmp_path):
    """And is named while it lives; the kernel lets go when it is killed, whatever it wrote."""
    with holder(tmp_path) as pid:
        for _ in range(2):  # being refused takes nothing from the holder
            with pytest.raises(
                UserError, match=f"in use by process {pid} on {socket.gethostname()};"
            ):
                Lock(tmp_path)
    assert f"process {pid}" in (tmp_path / ".lock").read_text()
    lock = Lock(tmp_path)
    assert in_use(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.release()


def test_holder_that_does_not_say_who_it_is(tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another process"):
            Lock(tmp_path)


def test_folder_that_cannot_be_locked(tmp_path):
    with pytest.raises(UserError, match="cannot be a run folder"):
        Lock(tmp_path / "absent")


def test_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, said):
    """Some network disks: better a run than none. A stand-in for the kernel."""

    def unsupported(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    Lock(tmp_path).release()
    assert "no locks on this file system" in said.text


def test_folder_in_use_is_refused_before_it_is_touched(images, tmp_path):
    config = parse_config(case("natural", "batch", images, small=True), "case")
    (tmp_path / "config.yaml").write_text(config.dump())
    with holder(tmp_path), pytest.raises(UserError, match="is in use by process"):
        train_run(config, tmp_path, "auto")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]


def test_what_an_unfinished_start_leaves_is_no_obstacle(images, tmp_path):
    """A disk was full, or the process was killed, before there was a config.yaml."""
    settings = case("natural", "group", images, small=True)
    (tmp_path / "run").mkdir()
    for name in (".lock", ".partial-config.yaml"):
        (tmp_path / "run" / name).write_text("half")
    train_run(parse_config(settings, "test"), tmp_path / "run", "auto")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_lock_is_held_while_training_and_let_go_after(images, tmp_path, monkeypatch):
    """Also where training fails."""
    held = []
    fit = Trainer.fit

    def watch(self: Trainer, around: Surroundings) -> None:
        held.append(in_use(around.run.path))
        fit(self, around)

    def fail(self: Trainer, around: Surroundings) -> None:
        held.append(in_use(around.run.path))
        raise RunFailure("made up")

    config = parse_config(case("natural", "batch", images, small=True), "case")
    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(RunFailure):
        train_run(config, tmp_path / "run", "auto")
    assert not in_use(tmp_path / "run")
    monkeypatch.setattr(Trainer, "fit", watch)
    train_run(config, tmp_path / "run", "auto")
    assert not in_use(tmp_path / "run")
    assert held == [True, True]


# --- what became of it ---------------------------------------------------------------------------


def test_mark(tmp_path):
    """The latest word alone, with the time and whatever else is known."""
    RunFolder(tmp_path).mark("running")
    RunFolder(tmp_path).mark("preempted", reason="SIGTERM", step=7, epoch=1.5)
    found = json.loads((tmp_path / "status.json").read_text())
    written = datetime.fromisoformat(found.pop("time"))
    assert abs(datetime.now(UTC) - written) < timedelta(minutes=1)
    assert found == {"state": "preempted", "reason": "SIGTERM", "step": 7, "epoch": 1.5}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_mark_that_cannot_be_written(tmp_path, monkeypatch):
    """The word before it stays, whole. A stand-in for a disk that fails when it is synced."""
    RunFolder(tmp_path).mark("running")
    before = (tmp_path / "status.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunFailure, match=r"status\.json: could not be written \(No space left"):
        RunFolder(tmp_path).mark("done")
    assert (tmp_path / "status.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def states(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    mark = RunFolder.mark

    def note(run: RunFolder, state: Any, **about: Any) -> None:
        seen.append(state)
        mark(run, state, **about)

    monkeypatch.setattr(RunFolder, "mark", note)
    return seen


def test_status_of_a_run_that_ends_well_and_of_one_that_fails(images, tmp_path, monkeypatch):
    seen = states(monkeypatch)
    config = parse_config(case("natural", "batch", images, small=True), "case")
    train_run(config, tmp_path / "well", "auto")
    assert seen == ["running", "done"]
    seen.clear()

    def fail(*arguments: Any) -> None:
        raise RunFailure("made up")

    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(RunFailure):
        train_run(config, tmp_path / "ill", "auto")
    assert seen == ["running", "failed"]
    assert json.loads((tmp_path / "ill" / "status.json").read_text())["reason"] == "made up"


# --- may this run go on? -------------------------------------------------------------------------

METHODS = tuple(own_methods())
MODELS = ("preact_resnet18", "wide_resnet", "resnet50", "timm")
SETS = ("imagefolder", "hf")

# Every key: another value than the one below or the default, and whether a run may go on with it.
DECIDED: dict[str, tuple[Any, str]] = {
    "method.name": ("natural", "no"),
    "method.guard": ("stop", "no"),
    "method.guard_rule": ("wong", "no"),
    "method.steps": (3, "no"),
    "method.replays": (3, "no"),
    "method.alpha": (0.01, "no"),
    "method.attack_mode": ("eval", "no"),
    "method.init": ("zero", "no"),
    "method.noise": (1.0, "no"),
    "method.beta": (1.0, "no"),
    "method.strength": (1.0, "no"),
    "method.start": ("random", "no"),
    "method.smoothing": (0.1, "no"),
    "method.refresh": (3, "no"),
    "method.hidden": ((0.0, 1.0), "no"),
    "method.temperature": ((2.0, 1.0), "no"),
    "method.share": ((0.5, 0.9), "no"),
    "threat.norm": ("l2", "no"),
    "threat.eps": (0.02, "no"),
    "threat.warmup": (1.0, "no"),
    "average.epochs": (2.0, "no"),
    "awp.gamma": (0.02, "no"),
    "awp.start": (1.0, "no"),
    "model.name": ("resnet50", "no"),
    "model.width": (4, "no"),
    "model.norm": ("group", "no"),
    "model.shortcut": ("raw", "no"),
    "model.final_norm": (False, "no"),
    "model.depth": (28, "no"),
    "model.widen": (2, "no"),
    "model.stem": ("imagenet", "no"),
    "model.arch": ("resnet18", "no"),
    "model.drop_path": (0.1, "no"),
    "model.pretrained": (True, "no"),
    "data.name": ("packed", "no"),
    "data.root": ("elsewhere", "yes"),
    # Where images are and who knows them there; which of them, and which column, are others.
    "data.path": ("elsewhere", "yes"),
    "data.subset": ("large", "yes"),
    "data.revision": ("main", "yes"),
    "data.train_split": ("train[:90%]", "no"),
    "data.test_split": ("validation", "no"),
    "data.image": ("img", "no"),
    "data.label": ("fine_label", "no"),
    "data.augment": (False, "no"),
    "data.crop_padding": (1, "no"),
    "data.drop_last": (True, "no"),
    "data.crop_shift": (4, "no"),
    "data.jitter": (0.4, "no"),
    "data.erase": (0.25, "no"),
    "data.mixup": (0.8, "no"),
    "data.cutmix": (1.0, "no"),
    "data.randaugment.ops": (1, "no"),
    "data.randaugment.magnitude": (5, "no"),
    "data.validation": (10, "no"),
    "data.size": (8, "no"),
    "data.shorter": (20, "no"),
    "data.crop_scale": ((0.1, 1.0), "no"),
    "data.extra.path": ("2m.npz", "yes"),
    "data.extra.fraction": (0.5, "no"),
    "data.resident_gb": (0.0, "yes"),
    "data.workers": (1, "yes"),
    "optim.name": ("adamw", "no"),
    "optim.lr": (0.1, "no"),
    "optim.nesterov": (True, "no"),
    "optim.beta2": (0.99, "no"),
    "optim.decay_norms": (False, "no"),
    "optim.clip": (1.0, "no"),
    "optim.momentum": (0.8, "no"),
    "optim.weight_decay": (0.0, "no"),
    "optim.schedule": ("constant", "no"),
    "optim.rise": (0.25, "no"),
    "optim.milestones": ([0.7], "no"),
    "optim.cycle_momentum": (True, "no"),
    "optim.warmup": (1.0, "no"),
    "optim.floor": (0.1, "no"),
    "optim.layer_decay": (0.9, "no"),
    "train.epochs": (46, "longer"),
    "train.max_steps": (10, "shorter"),
    "train.accumulate": (2, "no"),
    "train.batch_size": (64, "no"),
    "train.label_smoothing": (0.1, "no"),
    "train.precision": ("fp32", "no"),
    "train.compile": ("default", "no"),
    "train.sync_batchnorm": (True, "no"),
    "train.deterministic": (False, "yes"),
    "train.seed": (1, "no"),
    "train.keep": (5, "yes"),
    "train.save_steps": (5, "yes"),
    "train.save_minutes": (5.0, "yes"),
    "train.max_minutes": (5.0, "yes"),
    "train.on_nan": ("skip", "yes"),
    "train.skip_limit": (5, "yes"),
    "train.timeout_minutes": (5.0, "yes"),
    "train.log_every": (5, "yes"),
    "train.threads": (1, "yes"),
    "train.start": ("elsewhere", "yes"),
    "eval.attacks": (["natural"], "yes"),
    "eval.limit": (5, "yes"),
    "eval.step_size": (0.1, "yes"),
    "eval.loss": ("margin", "yes"),
    "eval.seed": (5, "yes"),
    "eval.batch_size": (5, "yes"),
    "eval.compile": ("default", "yes"),
    "eval.every": (5, "yes"),
    "eval.curve_attack": ("pgd-5", "yes"),
    "eval.curve_limit": (5, "yes"),
    "track.tensorboard": (True, "yes"),
    "track.wandb.mode": ("offline", "yes"),
    "track.wandb.project": ("p", "yes"),
    "track.wandb.entity": ("e", "yes"),
    "track.wandb.name": ("n", "yes"),
    "track.wandb.group": ("g", "yes"),
    "track.wandb.job_type": ("j", "yes"),
    "track.wandb.notes": ("why", "yes"),
    "track.wandb.tags": (["t"], "yes"),
}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def build(
    method: str = "fast", model: str = "preact_resnet18", data: str = "imagefolder", **changes: Any
) -> Config:
    """The configuration of these names, with `changes` at `section__key`."""
    images: dict[str, Any] = {"name": data, "size": 16, "shorter": 16}  # sizes are of files alone
    images |= {"path": "somebody/images"} if data == "hf" else {}
    images |= {"crop_scale": [0.5, 1.0], "extra": {"path": "1m.npz"}, "randaugment": {}}
    net = {"name": model, **({"arch": "resnet10t"} if model == "timm" else {})}
    tree: dict[str, Any] = {"method": {"name": method}, "model": net, "data": images}
    tree |= {"average": {}, "awp": {}, "optim": {"schedule": "cosine"}}  # warm-up is of no cyclic
    for place, value in changes.items():
        node = tree
        *parents, leaf = place.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse_config(tree, "test")


def with_key(key: str) -> Config:
    """The first configuration that has this key."""
    every = (
        build(method, model, data)
        for data in SETS
        for method in reversed(METHODS)
        for model in MODELS
    )
    return next(config for config in every if key in flat(config.model_dump()))


def test_run_from_before_there_was_a_choice_of_shortcuts():
    """Its config.yaml and its checkpoints lack the keys; it goes on as what it was."""
    new = build()
    tree = new.model_dump()
    del tree["model"]["shortcut"], tree["model"]["final_norm"]
    assert differences(parse_config(tree, "old"), new) == []
    assert training_differences(parse_config(tree, "old"), build(model__shortcut="raw"))


EVERY_KEY = sorted(
    {
        key
        for method in METHODS
        for model in MODELS
        for data in SETS
        for key in flat(build(method, model, data).model_dump())
    }
)


@pytest.mark.parametrize("section", ["average", "awp"])
def test_a_run_goes_on_without_what_it_had_no_more_than_with_what_it_had_not(section):
    on, off = build(), build(**{section: None})
    assert training_differences(on, off)
    assert training_differences(off, on)
    assert training_differences(off, off) == []


@pytest.mark.parametrize("key", EVERY_KEY)
def test_every_key_is_decided_on(key):
    """What changes training is refused, what does not is not, more of the same is longer."""
    assert key in DECIDED, f"may a run go on with another {key}? add the key to DECIDED"
    value, verdict = DECIDED[key]
    old = with_key(key)
    # Which is a crop in place of boxes at random.
    fixed = {"data__crop_scale": None} if key == "data.crop_shift" else {}
    names = {"method": old.method.name, "model": old.model.name, "data": old.data.name}
    kinds = {name: kind for name, kind in names.items() if key != f"{name}.name"}
    old = build(old.method.name, old.model.name, **fixed) if fixed else old
    new = build(**kinds, **fixed, **{key.replace(".", "__"): value})
    before = flat(old.model_dump())[key]
    line = f"{key}: {before} -> {value}"
    assert line in differences(old, new)
    assert (line in training_differences(old, new)) == (verdict in ("no", "shorter"))
    assert longer(old, new) == ([line] if verdict == "longer" else [])
    if not key.endswith(".name") or key == "track.wandb.name":
        assert differences(old, new) == [line]
        # And back: what may change may change back, but for a run that gets shorter.
        back = f"{key}: {value} -> {before}"
        assert training_differences(new, old) == ([back] if verdict in ("no", "longer") else [])
        assert longer(new, old) == ([back] if verdict == "shorter" else [])


def test_no_decision_about_a_key_that_is_gone():
    assert sorted(DECIDED) == EVERY_KEY


@pytest.mark.parametrize(
    ("old", "new", "grown", "refused"),
    [
        ({"epochs": 5}, {"epochs": 5}, [], []),
        ({"epochs": 5}, {"epochs": 6}, ["train.epochs: 5 -> 6"], []),
        ({"epochs": 5}, {"epochs": 4}, [], ["train.epochs: 5 -> 4"]),
        ({"max_steps": 9}, {"max_steps": 10}, ["train.max_steps: 9 -> 10"], []),
        ({"max_steps": 9}, {}, ["train.max_steps: 9 -> None"], []),
        ({"max_steps": 9}, {"max_steps": 8}, [], ["train.max_steps: 9 -> 8"]),
        ({}, {"max_steps": 10**9}, [], ["train.max_steps: None -> 1000000000"]),
        (
            {"epochs": 5, "max_steps": 9},
            {"epochs": 6, "max_steps": 8},
            ["train.epochs: 5 -> 6"],
            ["train.max_steps: 9 -> 8"],
        ),
        (
            {"epochs": 5, "seed": 1},
            {"epochs": 6, "seed": 2},
            ["train.epochs: 5 -> 6"],
            ["train.seed: 1 -> 2"],
        ),
    ],
)
def test_longer_is_allowed_and_shorter_is_not(old, new, grown, refused):
    one, two = (
        build(**{f"train__{key}": value for key, value in keys.items()}) for keys in (old, new)
    )
    assert longer(one, two) == grown
    assert training_differences(one, two) == refused


def test_another_experiment_is_refused_and_its_folder_let_alone(tmp_path):
    (tmp_path / "config.yaml").write_text(build(train__epochs=5).dump())
    with pytest.raises(UserError, match=r"train\.epochs: 5 -> 4; train\.seed: 0 -> 1"):
        claim.take(RunFolder(tmp_path), build(train__epochs=4, train__seed=1), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    lock = claim.take(RunFolder(tmp_path), build(train__epochs=6, train__keep=9), resume=True)
    assert lock is not None
    lock.release()


# --- held-out images, and the best epoch on them ------------------------------------------------


def numbered(n: int) -> Dataset:
    """Image number i is filled with i, and its label is i."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 2, 2)
    return Dataset("made up", images, torch.arange(n), [str(i) for i in range(n)], 1, False)


@pytest.mark.parametrize("n", [1, 30, 99])
def test_hold_out(n):
    """Disjoint, complete, a mix, and images with their labels."""
    rest, held = numbered(100).hold_out(n)
    assert (len(rest), len(held)) == (100 - n, n)
    assert sorted(rest.labels.tolist() + held.labels.tolist()) == list(range(100))
    for part in (rest, held):
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)
        assert part.classes == numbered(100).classes
    if n == 30:
        assert held.labels.tolist() != list(range(30))
        assert 30 < held.labels.double().mean() < 70


def test_hold_out_depends_on_the_number_of_images_alone():
    """Not on a generator, nor on what the images show: every run holds out the same."""
    first = numbered(100).hold_out(30)[1].labels
    torch.manual_seed(5)
    assert torch.equal(numbered(100).hold_out(30)[1].labels, first)
    assert set(numbered(100).hold_out(20)[1].labels.tolist()) < set(first.tolist())


@pytest.mark.parametrize("n", [100, 101])
def test_something_must_be_left(n):
    with pytest.raises(UserError, match=rf"data\.validation: {n} images to hold out of 100"):
        numbered(100).hold_out(n)


class Killed(BaseException):
    """Nothing catches this, as nothing catches SIGKILL."""


class Scripted(Trainer):
    """Whose held-out robust accuracy is what the script says of each epoch, in 30 images."""

    script = [1, 7, 3, 7, 2]

    def point(self, session: Any) -> dict[str, Any]:
        measured = super().point  # which calls evaluate below
        Scripted.now = self.script[self.learner.clock.epoch - 1]
        return measured(session)


def scripted(*arguments: Any, **more: Any) -> Any:
    (natural, fgsm, pgd), examples = evaluate(*arguments, **more)
    assert pgd.n == 30
    return [natural, fgsm, replace(pgd, correct=Scripted.now)], examples


def best_run(images: Path, **sections: dict[str, Any]) -> Config:
    tree = case("natural", "batch", images, small=True)
    tree["train"] |= {"epochs": 5, "keep": 1, "batch_size": 45}
    tree["data"] |= {"validation": 30}
    tree["eval"] = {"every": 1, "curve_attack": "pgd-1", "attacks": ["natural"]}
    return parse_config({**tree, **sections}, "best")


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (run_dir / "checkpoints").iterdir())


def test_checkpoint_of_the_best_pass_stays(images, tmp_path, monkeypatch):
    """Whatever `keep` is, through being killed, and of two equal ones the first."""
    monkeypatch.setattr("dist_adv.training.run.Trainer", Scripted)
    monkeypatch.setattr("dist_adv.training.curve.evaluate", scripted)
    run_dir = tmp_path / "run"
    train_run(best_run(images), run_dir, "none")
    assert steps(run_dir) == [4, 10]  # 90 images in batches of 45: two steps an epoch
    best = checkpoint.load(run_dir / "checkpoints" / "step-000000010").state["best"]
    assert best == {"step": 4, "epoch": 2.0, "accuracy": 7 / 30}
    assert checkpoint.load(run_dir / "checkpoints" / "step-000000004").state["clock"]["step"] == 4

    # Killed right after the fourth epoch, whose checkpoint must remember the second.
    killed, save = tmp_path / "killed", checkpoint.save

    def save_and_die(folder: Path, step: int, *rest: Any) -> Path:
        path = save(folder, step, *rest)
        if step == 8:
            raise Killed
        return path

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(Killed):
        train_run(best_run(images), killed, "none")
    assert steps(killed) == [4, 8]
    monkeypatch.setattr(checkpoint, "save", save)
    train_run(best_run(images), killed, "auto")
    assert steps(killed) == [4, 10]
    assert checkpoint.load(killed / "checkpoints" / "step-000000010").state["best"] == best


def test_test_images_choose_no_best_epoch(images, tmp_path):
    data = {**case("natural", "batch", images, small=True)["data"], "validation": 0}
    train_run(best_run(images, data=data), tmp_path / "run", "none")
    assert len(steps(tmp_path / "run")) == 1
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.load(path).state["best"] is None
