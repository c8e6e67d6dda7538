"""What a person sees of training: a bar on a terminal, a line a minute elsewhere."""

import logging
import time
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

if TYPE_CHECKING:
    pass


log = logging.getLogger("dist_adv")

_SECONDS_BETWEEN_LINES = 60.0


class TrainingDisplay:
    """What a person sees while training: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self.progress, self.total = progress, total
        self.task = progress.add_task("training", total=total, completed=done, status="")
        self.said = time.monotonic()

    def update(self, record: dict[str, Any]) -> None:
        status = (
            f"loss {record['loss']:.3f}  accuracy {record['accuracy']:.1%}  "
            f"{record['images_per_s']:,.0f} images/s"
        )
        self.progress.update(self.task, completed=record["step"], status=status)
        if self.progress.disable and time.monotonic() - self.said > _SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            done = f"epoch {record['epoch']:.2f}  step {record['step']} of {self.total}"
            log.info("%s  %s", done, status)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        self.said = time.monotonic()
        line = (
            f"epoch {record['epoch']:g}/{epochs}  loss {record['train_loss']:.3f}  "
            f"train {record['train_accuracy']:.1%}"
        )
        if "test_accuracy" in record:
            line += (
                f"  {record['curve_split']} {record['test_accuracy']:.1%}  "
                f"{record['curve_attack']} {record['pgd_accuracy']:.1%}"
            )
        log.info("%s  %.1f s of training", line, record["seconds"])
