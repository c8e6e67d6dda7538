"""Nothing that is read is executed, and damage to a real run's files is seen."""

import hashlib
import io
import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from cases import config
from dist_adv import cli, load_model
from dist_adv.config import parse_config
from dist_adv.errors import UserError
from dist_adv.runs import checkpoint
from dist_adv.training.run import train_run


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.write_text, (self.canary, "executed")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint of every batch, and its configuration beside it."""
    folder = tmp_path_factory.mktemp("hostile")
    tree = config("free", "batch", images, small=True)
    tree["train"] |= {"save_steps": 1, "keep": 100}
    tree["eval"] = {"attacks": ["natural", "pgd-2"], "every": 0}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(tree))
    train_run(parse_config(tree, "free"), folder / "run", "none")
    return folder


def files(folder: Path) -> list[str]:
    """Everything in a run folder that somebody reads."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    return [
        *(path.name for path in folder.iterdir() if path.is_file()),
        *(str(path.relative_to(folder)) for path in newest.iterdir()),
        "STOP",
    ]


FILES = [
    ".lock",
    "STOP",
    "config.yaml",
    "env.json",
    "examples.safetensors",
    "log.txt",
    "metrics.jsonl",
    "model.safetensors",
    "results.jsonl",
    "status.json",
    *(
        f"checkpoints/step-000000024/{name}"
        for name in (
            "good.safetensors",
            "manifest.json",
            "method.safetensors",
            "model.safetensors",
            "optimizer.safetensors",
            "ranks.safetensors",
            "state.json",
        )
    ),
]

# Beside checkpoints, by a run that goes on.
HEEDED = (".lock", "STOP", "config.yaml", "metrics.jsonl")


def test_no_file_is_forgotten_here(run):
    assert sorted(files(run / "run")) == sorted(FILES)


def commands(folder: Path) -> list[list[str]]:
    """Everything that reads a run, each as typed."""
    run_dir, out = str(folder / "run"), folder / "out"
    return [
        ["train", str(folder / "experiment.yaml"), "--run-dir", run_dir, "eval.limit=3"],
        ["eval", run_dir, "--attacks", "natural"],
        ["report", run_dir, "--out", str(out / "report")],
        ["export", run_dir, "--out", str(out / "export")],
    ]


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_never_executed(name, kind, run, tmp_path, capsys, undrawn):
    """Each command ends well without it, or with one line; `train` with a run to go on with."""
    goes_on = name.startswith("checkpoints/") or name in HEEDED
    for unfinished in (False, True) if goes_on else (False,):
        folder = tmp_path / str(unfinished)
        shutil.copytree(run, folder)
        canary, file = folder / "canary", folder / "run" / name
        if unfinished and name != "model.safetensors":
            (folder / "run" / "model.safetensors").unlink()
        if kind == "torch":
            buffer = io.BytesIO()
            torch.save(Payload(canary), buffer)
            file.write_bytes(buffer.getvalue())
        else:
            file.write_bytes(pickle.dumps(Payload(canary)))
        # Only training reads checkpoints, and goes on from them.
        for arguments in commands(folder)[:1] if unfinished else commands(folder):
            status = cli._run(arguments)
            complaint = capsys.readouterr().err
            assert status in (0, 1, 2, 143), arguments  # 143: a STOP file is one whatever it holds
            assert "Traceback" not in complaint
        assert not canary.exists()
        with suppress(UserError):
            load_model(folder / "run")
        assert not canary.exists()


def test_yaml_makes_no_objects(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    canary = folder / "canary"
    attack = f"!!python/object/apply:os.system ['touch {canary}']\n"
    for name in ("run/config.yaml", "experiment.yaml"):
        file = folder / name
        text = file.read_text()
        file.write_text(f"method: {attack}")
        assert cli._run(commands(folder)[0]) == 2
        assert not canary.exists()
        assert len(capsys.readouterr().err.splitlines()) == 1
        file.write_text(text)


def flip(content: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def cut(share: float):
    return lambda content: content[: int(share * len(content))]


DAMAGE = {"0 %": cut(0), "50 %": cut(0.5), "99 %": cut(0.99), "bit": flip}
IN_CHECKPOINT = [Path(name).name for name in FILES if name.startswith("checkpoints/")]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", IN_CHECKPOINT)
def test_damage_in_mid_epoch_is_seen_said_and_gone_round(name, damage, run, tmp_path, capsys):
    """The batch before is gone on with, to the weights of the run to which nothing happened."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    run_dir = folder / "run"
    whole = load_model(run_dir).state_dict()
    (run_dir / "model.safetensors").unlink()
    for path in sorted((run_dir / "checkpoints").iterdir())[6:]:
        shutil.rmtree(path)
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    assert newest.name == "step-000000018"  # the sixth of eight batches: in the second epoch
    file = newest / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    said = []
    path, _ = checkpoint.load_newest(run_dir / "checkpoints", said.append)
    assert path.name == "step-000000015"
    assert len(said) == 1
    assert str(newest) in said[0]
    if damage == "bit":  # end to end
        assert cli._run(commands(folder)[0]) == 0
        log = (run_dir / "log.txt").read_text()
        assert f"passed over: {newest}" in log
        assert f"going on from {path}" in log
        found = load_model(run_dir).state_dict()
        assert all(torch.equal(whole[key], found[key]) for key in whole)


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_push_out_no_good_one(keep, run, tmp_path, monkeypatch):
    """Killed after its next checkpoint, the run has one to go on from, however few are kept."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    run_dir = folder / "run"
    whole = load_model(run_dir).state_dict()
    (run_dir / "model.safetensors").unlink()
    for path in sorted((run_dir / "checkpoints").iterdir())[4:]:
        (path / "model.safetensors").write_bytes(b"")
    save = checkpoint.save

    class Killed(BaseException):
        """Nothing catches this, as nothing catches SIGKILL."""

    def save_and_die(*arguments: object) -> None:
        assert save(*arguments).name == "step-000000015"  # type: ignore[arg-type]
        raise Killed

    train = [*commands(folder)[0], f"train.keep={keep}"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            cli._run(train)
    assert checkpoint.load_newest(run_dir / "checkpoints", str)[0].name == "step-000000015"
    assert cli._run(train) == 0
    found = load_model(run_dir).state_dict()
    assert all(torch.equal(whole[key], found[key]) for key in whole)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_the_payload_acts_where_it_is_unpickled(kind, tmp_path):
    """Or the tests above would see nothing."""
    canary, buffer = tmp_path / "canary", io.BytesIO()
    if kind == "torch":
        torch.save(Payload(canary), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=False)
    else:
        pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()


DEEP = "[" * 200_000
SHAPES = {
    "a result without its attack": ("results.jsonl", '{"step": 24}\n'),
    "a deep result": ("results.jsonl", f"{DEEP}\n{{}}\n"),
    "a deep metric": ("metrics.jsonl", f"{DEEP}\n{{}}\n"),
    "a deep environment": ("env.json", DEEP),
    "a deep configuration": ("config.yaml", f"a: {DEEP[:20_000]}"),
    "a month 13": ("config.yaml", "a: 2024-13-45"),
    "a deep manifest": ("checkpoints/step-000000024/manifest.json", DEEP),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_of_another_shape_costs_one_line(shape, run, tmp_path, capsys, undrawn):
    """What raises here would be a traceback."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    name, text = SHAPES[shape]
    (folder / "run" / name).write_text(text)
    for arguments in commands(folder):
        assert cli._run(arguments) in (0, 2), arguments
    capsys.readouterr()


@pytest.mark.parametrize("override", ["model.width=3", "train.batch_size=3", "optim.lr=0.3"])
def test_an_evaluation_takes_no_override_without_effect(override, run, capsys):
    assert cli._run(["eval", str(run / "run"), override]) == 2
    assert f"{override.split('=')[0]}: " in (said := capsys.readouterr().err)
    assert "has no effect on an evaluation" in said


def test_weights_of_a_checkpoint_are_no_finished_run(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    weights = folder / "run" / "checkpoints" / "step-000000024" / "model.safetensors"
    assert load_model(weights.parent) is not None
    shutil.copy(weights, folder / "run" / "model.safetensors")
    for arguments in (*commands(folder)[:2], commands(folder)[3]):
        assert cli._run(arguments) == 2, arguments
        (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("dist-adv:"))
        assert "weights of a checkpoint and not of a finished run" in line


@pytest.mark.parametrize("text", ["[]", "{}", "3", DEEP])
def test_a_state_that_its_manifest_vouches_for_and_is_none(text, run, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "run" / "checkpoints", folder)
    newest = folder / "step-000000024"
    (newest / "state.json").write_text(text)
    manifest = json.loads((newest / "manifest.json").read_text())
    sha = hashlib.sha256(text.encode()).hexdigest()
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": sha}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    path, _ = checkpoint.load_newest(folder, lambda message: None)
    assert path.name == "step-000000021"
