"""Many runs from one file: a grid over keys, named runs, or both.

`load_sweep` reads such a file and checks every run of it before any starts. `claim` makes a folder
the sweep's own, with the resolved sweep in it as `sweep.yaml`, a file of the same format. Each run
has a folder in there, in the name of the run.
"""

import difflib
import fcntl
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from rich.box import SIMPLE
from rich.table import Table

from dist_adv import files, packages
from dist_adv.config import Config, load_config, training_differences
from dist_adv.config.loading import read_mapping
from dist_adv.config.yaml_text import to_yaml
from dist_adv.distributed.stopping import STOP_FILE
from dist_adv.errors import UserError
from dist_adv.options import Options
from dist_adv.runs import reading
from dist_adv.runs.status import SLURM_JOB
from dist_adv.text import duration, nearest, pixels

SAVED = reading.SWEEP
REPORT = "report"
_TAKEN = (SAVED, REPORT, "logs", STOP_FILE, SLURM_JOB)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")


class NamedRun(Options):
    """A run with a name of its own. base, set: over those of the whole file."""

    name: str
    base: str | None = None
    set: dict[str, Any] = {}


class SweepFile(Options):
    """base: a configuration, relative to this file. set: overrides for every run. grid: lists of
    values by key path, of which every combination is a run. runs: more of them, by name."""

    base: str | None = None
    set: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    runs: list[NamedRun] = []


@dataclass(frozen=True)
class SweepRun:
    """A checked configuration; its name is also that of its folder."""

    name: str
    config: Config


@dataclass(frozen=True)
class Sweep:
    """What a sweep file describes, checked."""

    name: str
    runs: Sequence[SweepRun]

    def find(self, which: str) -> SweepRun:
        """Return a run by its name, or its number from 0. Raises UserError where there is none."""
        for number, run in enumerate(self.runs):
            if which in (run.name, str(number)):
                return run
        near = difflib.get_close_matches(which, [run.name for run in self.runs], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"0 to {len(self.runs) - 1}, or a name"
        raise UserError(f"--only: the sweep {self.name} has no run {which!r}; {hint}")

    def dump(self) -> str:
        """Return the runs as a sweep file that needs no other."""
        runs = [{"name": run.name, "set": run.config.model_dump()} for run in self.runs]
        return to_yaml({"runs": runs})


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and check every run; `overrides` (`key.path=value`) apply to all of them.

    Raises UserError naming the file, the run and the key.
    """
    path = packages.own_or_shipped(path)
    file = _read(path)
    named = [*_grid(file.grid), *file.runs]
    if not named:
        raise UserError(f"{path}: describes no run; it needs 'grid:' or 'runs:'")
    _check_names(path, [run.name for run in named])
    return Sweep(path.stem, [_resolve(path, file, run, overrides) for run in named])


def _read(path: Path) -> SweepFile:
    tree = read_mapping(path, "grid: {train.seed: [0, 1]}")
    try:
        return SweepFile.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(map(_explain, error.errors()))}") from None


def _explain(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            section = NamedRun if error["loc"][0] == "runs" else SweepFile
            return f"{key}: unknown key{nearest(str(error['loc'][-1]), list(section.model_fields))}"
        case "missing":
            return f"{key}: missing"
        case _:
            return f"{key}: {error['msg'].lower()} (it is {error['input']!r})"


def _grid(grid: Mapping[str, Sequence[Any]]) -> Iterator[NamedRun]:
    """Yield a run for each combination, named `replays-4` or `alpha-10_255-batch_size-256`."""
    if not grid:
        return
    last = [key.split(".")[-1] for key in grid]
    labels = [word if last.count(word) == 1 else key for key, word in zip(grid, last, strict=True)]
    for values in itertools.product(*grid.values()):
        parts = [f"{label}-{_word(value)}" for label, value in zip(labels, values, strict=True)]
        yield NamedRun(name="-".join(parts), set=dict(zip(grid, values, strict=True)))


def _word(value: Any) -> str:
    """Return a value as a part of a file's name."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: the run name {name!r} is no folder name here; take up to 100 letters, "
                "digits, '.', '_' and '-', with a letter first"
            )
        if name in _TAKEN:
            raise UserError(f"{path}: the run name {name!r} is a sweep's own; choose another")
        if names.count(name) > 1:
            raise UserError(f"{path}: two runs have the name {name!r}; give each its own")


def _resolve(path: Path, file: SweepFile, run: NamedRun, overrides: Sequence[str]) -> SweepRun:
    base = run.base or file.base
    # JSON is YAML too: a value that was quoted stays text.
    assignments = [
        f"{key}={json.dumps(value, default=str)}"
        for key, value in [*file.set.items(), *run.set.items()]
    ]
    try:
        config = load_config(base and path.parent / base, [*assignments, *overrides])
    except UserError as error:
        raise UserError(f"{path}: run {run.name!r}: {error}") from None
    return SweepRun(run.name, config)


def claim(sweep: Sweep, out: Path) -> None:
    """Make `out` the folder of this sweep, or find that it is.

    Raises UserError where it holds something else, or a sweep that trains something else. Runs of
    one sweep may call this at the same time.
    """
    saved, text = out / SAVED, sweep.dump()
    with _one_at_a_time(out):
        if saved.exists():
            _check_same(load_sweep(saved), sweep, out)
        if not saved.exists() or saved.read_text() != text:
            files.replace(saved, text.encode())


def check(sweep: Sweep, out: Path) -> None:
    """Make `out` where there is nothing. Raises UserError as `claim` does, which also writes."""
    _make(out)
    if (out / SAVED).exists():
        _check_same(load_sweep(out / SAVED), sweep, out)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        content = [name for name in os.listdir(out) if not name.startswith(".")]
    except OSError as error:
        raise _unusable(out, error) from None
    if content and SAVED not in content:
        raise UserError(f"{out}: is not empty and no sweep's folder; choose another --out")


def _unusable(out: Path, error: OSError) -> UserError:
    return UserError(f"{out}: cannot be a sweep's folder ({error.strerror}); choose another --out")


@contextmanager
def _one_at_a_time(out: Path) -> Iterator[None]:
    """Lock the folder of a sweep, which is made where there is none."""
    _make(out)
    try:
        file = (out / ".claim").open("w")
    except OSError as error:
        raise _unusable(out, error) from None
    with file:
        with suppress(OSError):  # a file system without locks: all would write the same
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_same(old: Sweep, new: Sweep, out: Path) -> None:
    def refuse(what: str) -> UserError:
        return UserError(f"{out}: holds another sweep ({what}); choose another --out")

    for number, (before, now) in enumerate(itertools.zip_longest(old.runs, new.runs)):
        there, here = (repr(run.name) if run else "missing" for run in (before, now))
        if there != here:
            raise refuse(f"run {number} is {there} there and {here} here")
        if changes := training_differences(before.config, now.config):
            raise refuse(f"run {there}: {'; '.join(changes)}")


def listing(sweep: Sweep, seconds: Mapping[str, float] | None = None) -> Table:
    """Return what would run; and how long, by each run's seconds of training: ? without."""
    table = Table(title=sweep.name, box=SIMPLE, padding=0, show_edge=False)
    table.add_column(justify="right")
    table.add_column("run", overflow="fold")
    for title in ("method", "model"):
        table.add_column(title, no_wrap=True)
    for title in ("width", "epochs", "replays", "alpha", "batch", "seed"):
        table.add_column(title, no_wrap=True, justify="right")
    if seconds is not None:
        table.add_column("~time", no_wrap=True, justify="right")
    for number, run in enumerate(sweep.runs):
        method, train, model = run.config.method.model_dump(), run.config.train, run.config.model
        cells = [
            number,
            run.name,
            _method(method),
            _model(model.model_dump()),
            getattr(model, "width", ""),
            train.epochs,
            method.get("replays", ""),
            pixels(method["alpha"]) if method.get("alpha") else "",
            ", ".join(map(str, _batch_sizes(run.config))),
            train.seed,
        ]
        if seconds is not None:
            cells.append(duration(seconds[run.name]) if run.name in seconds else "?")
        table.add_row(*map(str, cells))
    return table


def _batch_sizes(config: Config) -> dict[int, None]:
    """Return the batch sizes of a run's stages, each once."""
    return dict.fromkeys(stage.train.batch_size for stage in config.stages.values())


def _method(options: Mapping[str, Any]) -> str:
    """Its name with what is unusual: pgd-7; fast, zero; fast, stop."""
    name = "-".join(str(options[key]) for key in ("name", "steps") if key in options)
    unusual = [options.get("init", "random"), options["guard"]]
    return ", ".join([name, *(word for word in unusual if word in ("zero", "previous", "stop"))])


def _model(options: Mapping[str, Any]) -> str:
    """preact_resnet18, wide_resnet-32-10, resnet50-imagenet: its name without the usual.

    Without the kind of PreActResNet18, too, which would make lines longer than 100 columns.
    """
    shown = [options[key] for key in ("name", "stem", "depth", "widen") if key in options]
    return "-".join([*map(str, shown), *["group"] * (options.get("norm") == "group")])


def as_wandb(sweep: Sweep, path: Path, overrides: Sequence[str], out: Path) -> str:
    """Return a W&B sweep configuration in which each agent takes runs by their names.

    W&B's own grids know nothing of named runs, nor of folders that a run can go on in.
    """
    command = ["${env}", "${interpreter}", "-m", "dist_adv", "sweep", str(path), *overrides]
    tree = {
        "name": sweep.name,
        "program": "dist_adv",
        "command": [*command, "--out", str(out), "${args}"],
        "method": "grid",
        "metric": {"name": "epoch/pgd_accuracy", "goal": "maximize"},
        "parameters": {"only": {"values": [run.name for run in sweep.runs]}},
    }
    return yaml.safe_dump(tree, sort_keys=False)
