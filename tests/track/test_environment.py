"""W&B's variables as people have them: old names, nothing at all, and what W&B itself refuses."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import wandb

import cases
from dist_adv import cli
from dist_adv.config import Config, parse_config
from dist_adv.errors import UserError
from dist_adv.runs import checkpoint
from dist_adv.runs.folder import RunFolder
from dist_adv.tracking import wandb_env, wandb_run
from dist_adv.tracking.sync import sync_runs
from dist_adv.tracking.tracker import check_tracking
from dist_adv.tracking.wandb_run import identity
from dist_adv.training.run import train_run
from permissions import no_override
from wandb_file import pieces
from wandb_file import settings as wandb_settings


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of W&B's, and nobody logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", "none")
    wandb.teardown()  # it reads the environment once


def config(images: Path, mode: str = "auto") -> Config:
    tree = cases.config("fast-random", "batch", images, small=True)
    return parse_config({**tree, "track": {"wandb": {"mode": mode}}}, "tracked")


def folder(path: Path, config: Config) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(config.dump())
    (path / "env.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ({}, "otherwise"),
        ({"WANDB_MODE": ""}, "otherwise"),
        ({"WANDB_MODE": " Offline "}, "offline"),
        ({"WANDB_MODE": "DISABLED"}, "disabled"),
        ({"WANDB_MODE": "auto"}, "auto"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "false"}, "otherwise"),
        ({"WANDB_DISABLED": "True", "WANDB_MODE": "offline"}, "offline"),
    ],
)
def test_mode(said: dict[str, str], means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert wandb_env.mode("otherwise") == means


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("a, b c,,", ["a", "b c"]),
        (" , ", ["fast", "imagefolder", "wide_resnet"]),
        ("x" * 64, ["x" * 64]),
    ],
)
def test_tags(said: str, found: list[str], images, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_TAGS", said)
    assert identity(RunFolder(tmp_path), config(images))["tags"] == found


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("WANDB_MODE", "ofline", "did you mean 'offline'"),
        ("WANDB_TAGS", f"a,{'x' * 65}", "a tag in the environment has 65 characters"),
        ("WANDB_RUN_ID", "a/b", "'a/b' in the environment"),
        ("WANDB_INIT_TIMEOUT", "soon", "'soon' in the environment is no number of seconds"),
        ("WANDB_INIT_TIMEOUT", "nan", "'nan' in the environment is no number of seconds"),
    ],
)
def test_refused_at_the_start(name, value, says, images, monkeypatch) -> None:
    """But where W&B is not used it does not matter; a mode that is none may have meant that."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}: .*{says}"):
        check_tracking(config(images))
    if name != "WANDB_MODE":
        check_tracking(config(images, mode="disabled"))


def test_variables_that_wandb_itself_would_refuse(images, tmp_path, monkeypatch) -> None:
    """WANDB_MODE=auto, empty tags and empty variables: recorded, under what they ask for."""
    for name, value in {
        "WANDB_MODE": "auto",
        "WANDB_TAGS": "a, b,,",
        "WANDB_RUN_ID": "",
        "WANDB_SILENT": "",
        "WANDB_INIT_TIMEOUT": " ",
    }.items():
        monkeypatch.setenv(name, value)
    settings = config(images, mode="disabled")
    run = wandb_run.start(RunFolder(folder(tmp_path / "run", settings)), settings)
    assert run is not None
    assert run.run.settings.mode == "offline"
    assert run.run.tags == ("a", "b")
    run.finish()
    assert os.environ["WANDB_MODE"] == "auto"


def test_variable_that_is_garbage_to_wandb(images, tmp_path, monkeypatch, capsys) -> None:
    """One line that names it; training would go on."""
    monkeypatch.setenv("WANDB_CONSOLE", "purple")
    monkeypatch.setattr(
        "dist_adv.tracking.wandb_run.log.warning", lambda text, *args: print(text % args)
    )
    settings = config(images, mode="offline")
    assert wandb_run.start(RunFolder(folder(tmp_path / "run", settings)), settings) is None
    said = capsys.readouterr().out
    assert said.startswith("no W&B (WANDB_CONSOLE: Input should be ")
    assert said.count("\n") == 1
    wandb.teardown()
    assert cli._run(["sync", str(tmp_path / "run"), "--offline", str(tmp_path / "o")]) == 1
    assert "not pushed (WANDB_CONSOLE: " in capsys.readouterr().err


def test_wandb_that_cannot_be_imported(images, tmp_path, monkeypatch, capsys) -> None:
    """Not installed: refused where it is asked for by name; `auto` says so and does without."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    for mode in ("online", "offline"):
        with pytest.raises(UserError, match=r"track\.wandb\.mode: wandb is not installed; pip "):
            check_tracking(config(images, mode))
    check_tracking(config(images))
    monkeypatch.setattr(
        "dist_adv.tracking.wandb_run.log.warning", lambda text, *args: print(text % args)
    )
    assert (
        wandb_run.start(RunFolder(folder(tmp_path / "run", config(images))), config(images)) is None
    )
    assert "no W&B (import of wandb halted" in capsys.readouterr().out
    assert cli._run(["sync", str(tmp_path / "run")]) == 2
    assert "sync: wandb is not installed; pip install wandb" in capsys.readouterr().err


def test_home_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    """Caches go elsewhere, unless somebody has said where."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MPLCONFIGDIR", "mine")
    monkeypatch.setenv("WANDB_CACHE_DIR", "")
    monkeypatch.delenv("WANDB_CACHE_DIR")
    cli._find_caches()
    assert "WANDB_CACHE_DIR" not in os.environ
    home.chmod(0o555)
    with no_override():
        cli._find_caches()
    assert Path(os.environ["WANDB_CACHE_DIR"]) == tmp_path / f"dist-adv-{os.getuid()}"
    assert os.environ["MPLCONFIGDIR"] == "mine"
    assert Path(os.environ["WANDB_CACHE_DIR"]).stat().st_mode & 0o777 == 0o700


# --- one id, one run ------------------------------------------------------------------------------


def test_copy_of_a_folder_is_another_run(images, tmp_path) -> None:
    """A folder that was moved is not; and a copy that is pushed is still the run that it was."""
    settings = config(images)
    first = identity(RunFolder(folder(tmp_path / "a", settings)), settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert identity(RunFolder(tmp_path / "b"), settings, keep=True) == first
    copied = identity(RunFolder(tmp_path / "b"), settings)
    assert copied["id"] != first["id"]
    assert copied["started_from"] == first["id"]
    assert identity(RunFolder(tmp_path / "b"), settings) == copied
    assert identity(RunFolder(tmp_path / "a"), settings) == first
    (tmp_path / "a").rename(tmp_path / "c")
    moved = identity(RunFolder(tmp_path / "c"), settings)
    assert moved == {**first, "name": "c", "folder": str(tmp_path / "c")}
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert identity(RunFolder(tmp_path / "link"), settings)["id"] == first["id"]


@pytest.mark.slow
def test_checkpoint_of_another_run(images, tmp_path) -> None:
    """Another run on W&B, which says where it comes from, also when it goes on and is pushed."""
    a, b, branch = tmp_path / "a", tmp_path / "b", config(images, mode="offline")
    train_run(branch, a, "none")
    saved = a / "checkpoints" / "step-000000004"
    train_run(branch, b, str(saved))
    ids = [json.loads((run / "wandb" / "run.json").read_text())["id"] for run in (a, b)]
    assert ids[0] != ids[1]
    (first,), (second,) = pieces(a), pieces(b)
    assert "started_from" not in wandb_settings(first)
    assert wandb_settings(second)["started_from"] == ids[0]
    newest = checkpoint.load(b / "checkpoints" / "step-000000008")
    assert newest.state["wandb_id"] == ids[1]
    for _ in sync_runs([b], tmp_path / "pushed"):
        pass
    (pushed,) = (tmp_path / "pushed").rglob("run-*.wandb")
    assert wandb_settings(pushed)["started_from"] == ids[0]

    # Its own checkpoint by its path is not another run's.
    for gone in (b / "model.safetensors", b / "results.jsonl", b / "wandb" / "run.json"):
        gone.unlink()
    train_run(branch, b, str(b / "checkpoints" / "step-000000008"))
    assert json.loads((b / "wandb" / "run.json").read_text())["id"] == ids[1]


GRID = "grid: {train.seed: [0, 1]}\nset: {method.name: fast, data.name: digits}"


@pytest.mark.parametrize("more", [[], ["--jobs", "2"], ["--slurm"], ["--dry-run"]])
def test_one_id_for_a_sweep_is_refused(more, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "fixed")
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(GRID)
    assert cli._run(["sweep", "sweep.yaml", *more]) == 2
    assert "WANDB_RUN_ID: is the id of one run, and these are 2" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_one_id_for_one_run_of_a_sweep(tmp_path, monkeypatch) -> None:
    """As W&B's agents give it."""
    monkeypatch.setenv("WANDB_RUN_ID", "fixed")
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(GRID)
    seen: list[str] = []
    monkeypatch.setattr("dist_adv.sweeps.local.run_one", lambda _, which, out: seen.append(which))
    assert cli._run(["sweep", "sweep.yaml", "--only", "seed-1"]) == 0
    assert seen == ["seed-1"]
