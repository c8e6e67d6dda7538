"""Bars on a terminal, plain lines elsewhere; on the main process only."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dist_adv.errors import RunFailure

log = logging.getLogger("dist_adv")

console = Console(stderr=True)


def interactive(shown_on: Console = console) -> bool:
    """Tell whether what was printed can be drawn anew: on a terminal, and none that is dumb.

    rich takes a file for a terminal under FORCE_COLOR.
    """
    return shown_on.is_interactive and shown_on.is_terminal and shown_on.file.isatty()


def start_logging(main: bool) -> None:
    """Messages to the terminal from the main process; the others only warn of errors."""
    log.setLevel(logging.INFO if main else logging.ERROR)
    if not any(isinstance(handler, RichHandler | _StderrHandler) for handler in log.handlers):
        handler: logging.Handler
        if interactive():
            handler = RichHandler(console=console, show_path=False, show_level=False)
        else:
            handler = _StderrHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False


class _StderrHandler(logging.Handler):
    """Write to what sys.stderr is now: a caller in-process may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextmanager
def log_file(path: Path, main: bool) -> Iterator[None]:
    """Everything that the main process says meanwhile also goes to `path`."""
    if not main:
        yield
        return
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # the line that did not fit is tried again here
            handler.close()


class _LogFile(logging.FileHandler):
    """A log that fails as everything else does and not with a traceback of logging's own."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        log.removeHandler(self)  # or saying so would fail again
        raise RunFailure(f"{self.baseFilename}: could not be written ({error})") from error


def bar(main: bool) -> Progress:
    """Return a progress bar with a `status` field; silent off the main process or a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (main and interactive()),
    )
