"""`--help` and `--version`: complete, with examples, and without waiting for torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_adv import __version__
from dist_adv.cli import cli

COMMANDS = sorted(cli.commands)
HEAVY = {"accelerate", "matplotlib", "numpy", "pydantic", "torch", "torchvision", "wandb", "yaml"}
MODULE = [sys.executable, "-m", "dist_adv"]
SCRIPT = [str(Path(sys.executable).with_name("dist-adv"))]
ENTRIES = [
    pytest.param(MODULE, id="module"),
    pytest.param(
        SCRIPT,
        id="script",
        marks=pytest.mark.skipif(not Path(SCRIPT[0]).exists(), reason="dist-adv is not installed"),
    ),
]


def ask(*command: str) -> str:
    """The standard output of a command that succeeds and complains of nothing."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def listed(text: str) -> dict[str, str]:
    """Command -> its one line, from the list at the end of the main help."""
    section = text.split("Commands:\n")[1].split("\n\n")[0]
    return dict(line.split(maxsplit=1) for line in section.splitlines())


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_main_help_lists_every_command(entry: list[str], flag: str) -> None:
    assert sorted(listed(ask(*entry, flag))) == COMMANDS


def test_main_help_shows_whole_commands_to_copy() -> None:
    """Its examples name commands that exist, and it says how to use a launcher."""
    text = ask(*MODULE, "--help")
    examples = re.findall(r"^  dist-adv (\S+)", text, re.MULTILINE)
    assert len(examples) >= 3
    assert set(examples) <= set(COMMANDS)
    assert "torchrun" in text
    assert "accelerate launch" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example(name: str) -> None:
    """An indented line that begins as one would type it; `Usage:` is none."""
    text = ask(*MODULE, name, "--help")
    assert text.startswith(f"Usage: dist-adv {name} ")
    assert re.search(rf"^\s+(dist-adv|torchrun .*-m dist_adv) {name}\b", text, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dist_adv", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert {"click", "dist_adv"} <= imported, "the listing was not understood"
    assert not imported & HEAVY


@pytest.mark.parametrize("entry", ENTRIES)
def test_version(entry: list[str]) -> None:
    assert ask(*entry, "--version").split() == ["dist-adv,", "version", __version__]
