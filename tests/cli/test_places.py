"""Run folders and files that cannot be looked into: one line, exit status 2.

Root may look into everything, so there a process of nobody's asks.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import dist_adv
from dist_adv import cli
from dist_adv.errors import UserError
from made_up_runs import make_run

LONG = "x" * 300
DIGITS = str(Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml")
COMMANDS = {
    "status": ["status", "PLACE"],
    "report": ["report", "PLACE", "--out", "new"],
    "export": ["export", "PLACE", "--out", "new"],
    "import": ["import", "PLACE", "--as", "preact_resnet18", "--normalise", "none", "--out", "new"],
    "plan": ["plan", "PLACE"],
    "step-times": ["plan", DIGITS, "--bandwidth", "10", "--step-times", "PLACE"],
    "sweep": ["sweep", "PLACE"],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    Path("loop").symlink_to("loop")
    Path("file").touch()
    make_run(Path("closed/run"))
    return tmp_path


@pytest.mark.parametrize("path", [LONG, "loop", "file/below"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be(
    name: str, path: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [path if word == "PLACE" else word for word in COMMANDS[name]]
    assert cli._run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dist-adv: ")
    assert path in line
    assert not Path("new").exists()


@pytest.mark.parametrize("path", [LONG, "loop", "file", "file/below", "nothing"])
def test_a_network_that_cannot_be(path: str, place: Path) -> None:
    with pytest.raises(UserError, match="^" + path):
        dist_adv.load_model(path)


def as_nobody(work: Callable[[], None]) -> None:
    """Do it in a child process without root's rights; what it raises is raised here."""
    if os.geteuid():
        work()
        return
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_folder_without_permission(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One command after the other, and a network."""

    def work() -> None:
        for name, command in COMMANDS.items():
            if name != "sweep":
                words = ["closed/run" if word == "PLACE" else word for word in command]
                assert cli._run(words) == 2, name
        with pytest.raises(UserError, match=r"^closed/run: .*Permission denied"):
            dist_adv.load_model("closed/run")

    for folder in (place, *place.parents[:2]):  # pytest's own are closed to others
        os.chmod(folder, 0o755)
    Path("closed").chmod(0)
    try:
        as_nobody(work)
    finally:
        Path("closed").chmod(0o755)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == len(COMMANDS) - 1, said
    assert all(line.startswith("dist-adv: ") and "Permission denied" in line for line in said)
