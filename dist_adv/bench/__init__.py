"""`dist-adv bench`: what training and evaluating cost here, against what people use."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dist_adv import files
from dist_adv.bench.cases import CASES, Bench, Row
from dist_adv.bench.timing import network
from dist_adv.distributed.start import precision_of, start_accelerator
from dist_adv.errors import UserError, unwritable
from dist_adv.runs.environment import cpu_name, git_commit
from dist_adv.terminal import bar, console, start_logging

_OPT_IN = ("robust",)  # eight minutes of training on data that are not here


def run_bench(
    cases: Sequence[str],
    out: Path,
    width: int,
    batch_size: int,
    precision: str,
    quick: bool,
    run_dir: Path | None,
    data: str | None,
) -> bool:
    """Run the cases (all but `robust` where none is named), write `bench.json` and `bench.md`.

    Returns whether every bar was met. Raises UserError for a case that does not exist.
    """
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        raise UserError(f"--only: {unknown[0]!r} is no case; use {', '.join(CASES)}")
    accelerator = start_accelerator(precision)
    start_logging(accelerator.is_main_process)
    if accelerator.num_processes > 1:
        raise UserError("bench: runs as one process; its case `ranks` starts two by itself")
    chosen = list(cases) or [case for case in CASES if case not in _OPT_IN]
    rows: list[Row] = []
    _make(out)
    header = about(accelerator.device, precision_of(accelerator))
    with bar(True) as progress:
        task = progress.add_task("bench", total=None)
        bench = Bench(
            accelerator,
            width,
            batch_size,
            quick,
            run_dir,
            data,
            out,
            lambda: progress.advance(task),
        )
        header["network"] = network(bench.config({"name": "natural"}).model)
        for name in chosen:
            progress.update(task, description=name)
            for row in CASES[name](bench):
                rows.append(row)
                console.print(f"{row.what}: [bold]{row.measured}[/bold]", highlight=False)
            _write(out, rows, header)
    console.print(_table(rows))
    return all(row.met is not False for row in rows)


def _make(out: Path) -> None:
    """Make the folder, or find that it has no other files of our names in it.

    Raises UserError where it has, or cannot be written to.
    """
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out: {out} is not a folder; name another")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error, "name another --out") from None
    for name in ("bench.json", "bench.md"):
        files.output_file(out / name, "--out", lambda _: _is_own(out / "bench.json"))


def _is_own(path: Path) -> bool:
    """Tell whether it is a record of this command's."""
    try:
        return {"rows", "hardware", "threads"} <= json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def about(device: torch.device, precision: str) -> dict[str, Any]:
    """Where and when a record was made."""
    cpu = f"{os.cpu_count()} cores ({cpu_name()})"
    return {
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": git_commit() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


_MET = {True: "met", False: "NOT met", None: ""}


def _write(out: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
    files.replace(out / "bench.json", text.encode())
    lines = [
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
        "",
        "Sides take turns in one process (A B A B) after warming up; a ratio is the median of the "
        "pairs', with its quartiles in brackets.",
        "",
        "| what | measured | bar | |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.measured} | {row.bar} | {_MET[row.met]} |" for row in rows),
        "",
    ]
    files.replace(out / "bench.md", "\n".join(lines).encode())


def _table(rows: Sequence[Row]) -> Table:
    table = Table("what", "measured", "bar", "")
    colours = {True: "[green]met[/green]", False: "[red]NOT met[/red]", None: ""}
    for row in rows:
        table.add_row(row.what, row.measured, row.bar, colours[row.met])
    return table
