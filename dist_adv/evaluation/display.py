"""What a person sees of an evaluation: a bar, then a table."""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from dist_adv.evaluation.results import Result


log = logging.getLogger("dist_adv")

_SECONDS_BETWEEN_LINES = 60.0


class EvaluationDisplay:
    """Show an evaluation: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("evaluating", total=None, status="")
        self.said = time.monotonic()

    def update(self, attack: str, done: int, of: int) -> None:
        self.progress.update(self.task, description=attack, completed=done, total=of)
        if self.progress.disable and time.monotonic() - self.said > _SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            log.info("%s: %d of %d images", attack, done, of)


def results_table(results: "Sequence[Result]", said: Sequence[str] = ()) -> None:
    """Print the final figures, and their flags but those that were `said` already."""
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
            if flag not in said:
                log.warning("%s: %s", result.attack, flag)
