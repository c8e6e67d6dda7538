"""What has become of runs, read off their folders and Slurm's queue. Nothing here writes."""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from dist_adv import streams
from dist_adv.errors import UserError
from dist_adv.runs import reading
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.lock import held
from dist_adv.terminal import interactive
from dist_adv.text import duration, shown

SLURM_JOB = "slurm_job"
"""In the folder of a run or sweep that was submitted: a line with the number of the job."""

_COLOURS = {
    "running": "cyan",
    "done": "green",
    "queued": "blue",
    "preempted": "yellow",
    "killed": "red",
    "failed": "red",
}
_SECONDS_BETWEEN_LOOKS = 2.0
_ANY_WIDTH = 1000


@dataclass(frozen=True)
class Status:
    """A run. total: steps; images: in an epoch; robust: the strongest attack and accuracy under it.

    The state is one of those of `folder.State`, or killed, queued or not started.
    """

    name: str
    state: str
    reason: str = ""
    step: int = 0
    total: int | None = None
    epochs: float = 0.0
    images: int = 0
    images_per_s: float | None = None
    robust: tuple[str, float] | None = None

    @property
    def left(self) -> float | None:
        """Seconds of training still to go, at the latest rate."""
        if not (self.step and self.total and self.images_per_s):
            return None
        return self.epochs * self.images * (self.total / self.step - 1) / self.images_per_s


def show(folders: Sequence[Path], watch: bool) -> None:
    """Print a table of runs, and of all runs of sweeps; over and over until Ctrl-C with `watch`.

    What is neither is passed over, which is said once. Raises UserError where nothing is a run.
    Where a terminal cannot be drawn anew, in a pipe or a file, each change is a table of its own.
    """
    others = [folder for folder in folders if not reading.kind_of(folder)]
    folders = [folder for folder in folders if folder not in others]
    if not folders:
        raise UserError(f"{others[0]}: is no folder of a run or of a sweep; name one")
    if others:
        print(reading.passed_over(others), file=sys.stderr)
    console, known = Console(), gather(folders)
    if not console.is_terminal:  # a run is a line, for grep
        console.width = _ANY_WIDTH
    if not watch or not interactive(console):
        console.print(Overview(known))
    if not watch:
        return
    live = Live(Overview(known), console=console, auto_refresh=False)
    with suppress(KeyboardInterrupt), live if interactive(console) else nullcontext():
        while not streams.lost():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            before, known = known, gather(folders)
            if live.is_started:
                live.update(Overview(known), refresh=True)
            elif known != before:
                console.print(Overview(known))
                console.file.flush()


def gather(folders: Sequence[Path]) -> list[Status]:
    """Return the runs in these folders, sweeps in the order of their files."""
    queue = _queue()
    found: list[Status] = []
    for folder in folders:
        if reading.kind_of(folder) == "sweep":
            found += _sweep(folder, queue)
        else:
            found.append(read(folder, str(folder), queue.get(_job(folder))))
    return found


def _sweep(folder: Path, queue: dict[str, tuple[str, str]]) -> Iterable[Status]:
    coming = held(folder)  # by a sweep that starts them one after another
    for number, name in enumerate(reading.names_in_sweep(folder)):
        run = folder / name
        task = queue.get(_job(run)) or queue.get(f"{_job(folder)}_{number}")
        if task is None and coming:
            task = "PENDING", ""
        found = read(run, str(run), task)
        word = last_word(log_of(folder, name)) if found.state == "not started" else ""
        if word and not word.startswith("stopped ("):  # it was asked to before it had begun
            found = replace(found, state="failed", reason=word)
        yield found


def log_of(sweep: Path, name: str) -> Path:
    """Return the file of what a run of a sweep says where it is a process of its own."""
    return sweep / "logs" / f"{name}.txt"


def last_word(log: Path, start: int = 0) -> str:
    """Return the last complaint of dist-adv after byte `start` of a log; '' where there is none."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(start)
        for line in reversed(file.read().decode(errors="replace").splitlines()):
            if line.startswith("dist-adv: "):
                return line.removeprefix("dist-adv: ")
    return ""


def read(run_dir: Path, name: str, task: tuple[str, str] | None = None) -> Status:
    """One run. task: what Slurm or a sweep says of it, as `squeue` does."""
    state, reason = _state(run_dir, task)
    last = reading.last_metrics(run_dir, "step") or {}
    env: Mapping[str, Any] = {}
    robust = None
    try:
        if RunFolder(run_dir).environment.exists():
            env = reading.read_environment(run_dir)
        robust = _robust(run_dir)
    except UserError as error:  # of this run alone: the others have their rows
        reason = reason or str(error)
    return Status(
        name,
        state,
        reason,
        step=last.get("step", 0),
        total=env.get("total_steps"),
        epochs=last.get("epoch", 0.0),
        images=env.get("dataset", {}).get("train", 0),
        images_per_s=last.get("images_per_s"),
        robust=robust,
    )


def _state(run_dir: Path, task: tuple[str, str] | None) -> tuple[str, str]:
    said = _object(RunFolder(run_dir).status)
    state, reason = str(said.get("state", "not started")), str(said.get("reason", ""))
    if state == "running" and held(run_dir) is False:
        state = "killed"
    if task and state not in ("running", "done", "failed"):
        where, why = task
        return ("queued", why) if where == "PENDING" else ("running", "")
    return state, reason


def _robust(run_dir: Path) -> tuple[str, float] | None:
    """Under the strongest attack on the final weights, or at the last point of the curve."""
    if RunFolder(run_dir).results.exists():
        config = reading.read_config(run_dir)
        results = reading.read_results(run_dir, config["threat"], config["data"]["name"])
        if strongest := reading.strongest(results.figures):
            return strongest.attack, strongest.accuracy
    curve = reading.last_metrics(run_dir, "pgd_accuracy")
    return (curve.get("curve_attack", "pgd"), curve["pgd_accuracy"]) if curve else None


def _object(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where there is none to be read."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}


def _job(folder: Path) -> str:
    with suppress(OSError):
        return (folder / SLURM_JOB).read_text().strip()
    return ""


def _queue() -> dict[str, tuple[str, str]]:
    """State and reason of the user's jobs in Slurm, array tasks one by one; none without Slurm."""
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [line.split("|", 2) for line in said.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


@dataclass(frozen=True)
class Overview:
    """The runs as a table, or a paragraph each where it is too wide for that, and the reasons."""

    runs: Sequence[Status]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = _table(self.runs)
        wanted = Measurement.get(console, options.update_width(_ANY_WIDTH), whole).maximum
        if wanted > options.max_width:
            yield from (paragraph for run in self.runs for paragraph in _paragraphs(run))
        else:
            yield whole
            yield from (Text(shown(f"{run.name}: {run.reason}")) for run in self.runs if run.reason)


def _table(runs: Sequence[Status]) -> Table:
    right = [Column(title, justify="right") for title in ("steps", "epochs", "images/s", "left")]
    made = Table("run", "state", *right, "robust", box=SIMPLE)
    for run in runs:
        made.add_row(Text(shown(run.name)), _state_of(run), *_cells(run).values())
    return made


def _paragraphs(run: Status) -> Sequence[RenderableType]:
    said = _state_of(run)
    for title, cell in _cells(run).items():
        if cell:
            said.append(f", {cell}" if title == "robust" else f", {cell} {title}", "default")
    if run.reason:
        said.append(shown(f": {run.reason}"), "default")
    return Text(shown(run.name), overflow="fold"), Padding(said, (0, 0, 0, 2))


def _state_of(run: Status) -> Text:
    return Text(run.state, _COLOURS.get(run.state, ""))


def _cells(run: Status) -> dict[str, str]:
    """Return what there is to say of a run, by what it is; empty where there is nothing."""
    live = run.state == "running"
    return {
        "steps": f"{run.step:,} of {run.total:,}" if run.total else "",
        "epochs": f"{run.epochs:.1f}" if run.epochs else "",
        "images/s": f"{run.images_per_s:,.0f}" if live and run.images_per_s else "",
        "left": duration(run.left) if live and run.left is not None else "",
        "robust": f"{run.robust[0]} {run.robust[1]:.1%}" if run.robust else "",
    }
