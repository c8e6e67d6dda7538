"""Bars on a terminal, plain lines elsewhere; on the main process only."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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
from rich.table import Table

if TYPE_CHECKING:
    from dist_adv.evaluate import Result

console = Console(stderr=True)
log = logging.getLogger("dist_adv")


def start_logging(main: bool) -> None:
    """Messages to the terminal from the main process; the others only warn of errors."""
    log.setLevel(logging.INFO if main else logging.ERROR)
    if not log.handlers:
        handler: logging.Handler
        if console.is_terminal:
            handler = RichHandler(console=console, show_path=False, show_level=False)
        else:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False


@contextmanager
def log_file(path: Path, main: bool) -> Iterator[None]:
    """Everything that the main process says meanwhile also goes to `path`."""
    if not main:
        yield
        return
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def bar(main: bool) -> Progress:
    """A progress display with a `status` field; silent off the main process or a terminal."""
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
        disable=not (main and console.is_terminal),
    )


def results_table(results: "Sequence[Result]") -> None:
    """The final figures, on standard output."""
    table = Table("attack", "accuracy", "95 % interval", "n", "seconds")
    for result in results:
        record = result.record()
        low, high = record["ci95"]
        table.add_row(
            result.attack,
            f"{result.accuracy:.2%}",
            f"{low:.2%} to {high:.2%}",
            f"{result.n:,}",
            f"{result.seconds:.1f}" + ("" if result.measured_in == result.attack else " (shared)"),
        )
    Console().print(table)
    for result in results:
        for flag in result.flags:
            log.warning("%s: %s", result.attack, flag)
