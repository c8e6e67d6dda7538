"""Debian's packages, for tests that need more than Python's."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_suffix(".sh")


def need(commands: str, *packages: str) -> None:
    """Install the packages where one of the commands is missing. Skips where it is not allowed."""
    done = subprocess.run([SCRIPT, commands, *packages], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
