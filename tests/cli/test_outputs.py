"""`--out` and its like: nothing is replaced but an earlier output of the same command.

A full disk is a limit on the size of files (RLIMIT_FSIZE) in a process of its own.
"""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import forked
from dist_adv import cli
from dist_adv.bench import CASES, Row
from dist_adv.config import parse_config
from dist_adv.models import build_model, save_model
from dist_adv.models.foreign_keys import public_keys
from limits import limited
from made_up_runs import evaluation, make_run

pytestmark = pytest.mark.usefixtures("undrawn")

DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"
PLAN = ["plan", str(DIGITS), "--gpus", "2", "--step-ms", "64:9", "--bandwidth", "10"]
IMPORT = ["import", "theirs.pt", "--as", "preact_resnet18", "--normalise", "none"]
IMPORT += ["data.name=digits"]
NOTES = "my notes"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a finished run in it, nobody logged in to W&B, and quick benchmarks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = make_run(Path("run"), results=[evaluation("natural", 0.9, step=40)])
    small = {"name": "preact_resnet18", "width": 1}
    config = parse_config({"method": {"name": "fast"}, "model": small}, "here")
    model = build_model(config.model, [0.5], [0.5], list("0123456789"), 0)
    state = model.net.state_dict()
    public = public_keys("preact_resnet18", state)
    torch.save({public[key]: each for key, each in state.items()}, "theirs.pt")
    trained = {"epoch": 4, "step": 40, "method": "natural", "data": "digits"}
    about = {**model.architecture, "trained": trained, "threat": {"norm": "linf", "eps": 8 / 255}}
    save_model(run / "model.safetensors", about, model.state_dict())
    monkeypatch.setitem(CASES, "peaks", lambda bench: iter([Row("peaks", "a", "1 s")]))
    return tmp_path


def commands(out: str) -> dict[str, list[str]]:
    return {
        "dashboard": ["dashboard", "--out", out],
        "plan": [*PLAN, "--json", out],
        "report": ["report", "run", "--out", out],
        "export": ["export", "run", "--out", out],
        "import": [*IMPORT, "--out", out],
        "bench": ["bench", "--only", "peaks", "--quick", "--precision", "fp32", "--out", out],
    }


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli._run(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dist-adv: ")
    return line


@pytest.mark.parametrize("name", commands(""))
def test_a_file_of_something_else_stays(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes").write_text(NOTES)
    assert "notes" in refused(commands("notes")[name], capsys)
    assert Path("notes").read_text() == NOTES


@pytest.mark.parametrize("name", ["dashboard", "plan"])
def test_a_device_a_pipe_and_a_folder_stay(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["pipe", "folder", "link"]
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("link").symlink_to("pipe")
    with suppress(PermissionError):  # who may make devices
        os.mknod("device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        names.append("device")
    before = [(os.lstat(out).st_ino, os.lstat(out).st_mode) for out in names]
    for out in names:
        assert "no regular file" in refused(commands(out)[name], capsys)
    assert [(os.lstat(out).st_ino, os.lstat(out).st_mode) for out in names] == before


@pytest.mark.parametrize("name", commands(""))
def test_a_place_that_cannot_be(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below a file, of a name that is too long, a link to itself."""
    Path("notes").write_text(NOTES)
    Path("loop").symlink_to("loop")
    for out in ("notes/new", "x" * 300, "loop"):
        assert out.split("/")[0] in refused(commands(out)[name], capsys)


def test_an_earlier_dashboard_is_replaced(place: Path) -> None:
    for _ in range(2):
        assert cli._run(commands("new.json")["dashboard"]) == 0
        assert json.loads(Path("new.json").read_text()).keys() == {"workspace", "report"}


def test_a_link_to_an_earlier_dashboard_stays_one(place: Path) -> None:
    Path("link").symlink_to("new.json")
    for _ in range(2):
        assert cli._run(commands("link")["dashboard"]) == 0
    assert Path("link").is_symlink()
    assert Path("new.json").is_file()


def test_an_earlier_plan_stays(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be a measurement of another machine."""
    assert cli._run(commands("new.json")["plan"]) == 0
    before = Path("new.json").read_bytes()
    assert "exists and is not overwritten" in refused(commands("new.json")["plan"], capsys)
    assert Path("new.json").read_bytes() == before


@pytest.mark.parametrize("name", ["export", "import"])
def test_an_earlier_export_stays(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._run(commands("new")[name]) == 0
    assert "new: cannot be written (File exists)" in refused(commands("new")[name], capsys)
    assert {path.name for path in place.iterdir()} == {"run", "theirs.pt", "new"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *[
            ("report", f"{kind}")
            for kind in ("report.md", "report.html", "results.csv", "against.csv")
        ],
        ("report", "figures/001-mine.png"),
        *[("bench", "bench.md"), ("bench", "bench.json")],
    ],
)
def test_files_of_our_names_stay(
    name: str, file: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("folder", file)
    path.parent.mkdir(parents=True)
    path.write_text(NOTES)
    assert path.name in refused(commands("folder")[name], capsys)
    assert path.read_text() == NOTES
    assert [each for each in Path("folder").rglob("*") if each.is_file()] == [path]


@pytest.mark.parametrize(("name", "page"), [("report", "report.html"), ("bench", "bench.md")])
def test_earlier_ones_are_replaced_and_other_files_stay(name: str, page: str, place: Path) -> None:
    folder = Path("folder")
    folder.mkdir()
    (folder / "notes").write_text(NOTES)
    assert cli._run(commands("folder")[name]) == 0
    (folder / page).write_text("of an earlier one")
    assert cli._run(commands("folder")[name]) == 0
    assert (folder / page).read_text() != "of an earlier one"
    assert (folder / "notes").read_text() == NOTES


# --- full disks ----------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "export", "import", "plan"])
def test_the_same_command_after_the_disk_has_room(name: str, place: Path) -> None:
    """One line, exit status 1; and then the command does what it would have done."""

    def call(start: Callable[..., Any], **more: Any) -> subprocess.CompletedProcess[str]:
        return start(
            [sys.executable, "-m", "dist_adv", *commands("new")[name]],
            # As a notebook's commands have it, whose module is not in this environment.
            env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
            capture_output=True,
            text=True,
            **more,
        )

    before = tree(place)
    for most in (0, 400):
        done = call(forked.run, preexec_fn=partial(limited, most))
        assert done.returncode == 1, done.stderr
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("dist-adv: "))
        assert "new" in line
        assert "could not be written (File too large)" in line
        assert "Traceback" not in done.stderr
        if name != "report":
            assert tree(place) == before
    # In a forked process matplotlib is imported, and MPLBACKEND was read.
    done = call(subprocess.run if name == "report" else forked.run)
    assert done.returncode == 0, done.stderr
    weights = "new/model.safetensors"
    files = {"report": "new/report.html", "export": weights, "import": weights, "plan": "new"}
    assert (place / files[name]).stat().st_size > 400


def test_an_export_that_was_killed_is_no_obstacle(place: Path) -> None:
    Path(".partial-new").mkdir()
    Path(".partial-new/model.safetensors").write_text("half")
    assert cli._run(commands("new")["export"]) == 0
    assert {path.name for path in place.iterdir()} == {"run", "theirs.pt", "new"}
