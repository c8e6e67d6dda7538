"""What the main process says."""

import contextlib
import io
import logging
import os
import pty
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from dist_adv import terminal
from dist_adv.terminal import bar, interactive, log_file, start_logging


@pytest.mark.parametrize(
    ("variables", "terminal", "drawn"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, True),
        ({"TERM": "xterm", "TTY_INTERACTIVE": "0"}, True, False),
        ({"TERM": "xterm", "TTY_COMPATIBLE": "0"}, True, False),
        ({"TERM": "xterm"}, False, False),
        ({"TERM": "xterm", "FORCE_COLOR": "1"}, False, False),
        ({"TERM": "xterm", "TTY_COMPATIBLE": "1"}, False, False),
    ],
)
def test_bars_are_for_terminals(
    variables: Mapping[str, str],
    terminal: bool,
    drawn: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outside, inside = pty.openpty()
    with os.fdopen(inside, "w") as tty, (tmp_path / "log").open("w") as log, os.fdopen(outside):
        shown_on = Console(file=tty if terminal else log, _environ=variables)
        assert interactive(shown_on) == drawn
        monkeypatch.setattr("dist_adv.terminal.console", shown_on)
        monkeypatch.setattr(interactive, "__defaults__", (shown_on,))
        with bar(True) as shown:
            assert shown.disable != drawn
    assert (tmp_path / "log").read_text() == ""


def test_the_log_takes_every_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the locale's encoding is, also a file name that is none of any encoding."""
    # Not pytest's handlers: its workers cannot send such a name on and end.
    monkeypatch.setattr(terminal.log, "handlers", [])
    start_logging(True)
    with log_file(tmp_path / "log.txt", True):
        logging.getLogger("dist_adv").info("a folder of \u6f22\udce9")
    assert (tmp_path / "log.txt").read_bytes().endswith(b"a folder of \xe6\xbc\xa2\\udce9\n")


def test_messages_go_to_what_stderr_is_at_the_time() -> None:
    """Commands run in one process, as in these tests or a notebook, each have their own."""
    for word in ("first", "second"):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            start_logging(True)
            logging.getLogger("dist_adv").info(word)
        assert stderr.getvalue().endswith(f" {word}\n")
        stderr.close()
