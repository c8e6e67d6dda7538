"""What the site's pages tell people to run works as it stands there, in order, in an empty folder.

Blocks of `bash` and `python` are run; `console` is what takes a download, a GPU or an hour. What
docs/extending.md shows is run by test_extending.py.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

import forked

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("start.md", "judging.md")  # the second judges what the first has trained
pytestmark = pytest.mark.slow


def commands(page: str) -> list[list[str]]:
    """Return the arguments for Python of each command and each program of a page."""
    found = []
    for language, text in re.findall(
        r"```(bash|python)\n(.*?)```", (DOCS / page).read_text(), re.S
    ):
        if language == "python":
            found.append(["-c", text])
            continue
        for line in text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "dist-adv", f"{page}: {line}"
            found.append(["-m", "dist_adv", *arguments])
    return found


def test_every_block_runs(tmp_path: Path) -> None:
    for page in PAGES:
        asked = commands(page)
        assert len(asked) > 2, page
        for arguments in asked:
            words = [
                each
                for word in arguments
                for each in (sorted(map(str, tmp_path.glob(word))) if word == "runs/*" else [word])
            ]
            done = forked.run(
                [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{page}: {arguments}\n{done.stdout}\n{done.stderr}"
