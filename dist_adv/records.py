"""Files of a run folder: JSON lines that grow, and files that are replaced whole."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_adv.errors import RunFailure, UserError

Record = dict[str, Any]


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line. Raises RunFailure where the disk refuses."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise RunFailure(f"{path}: could not be written ({error.strerror})") from error


def replace(path: Path, content: bytes) -> None:
    """The whole new file or the whole old one, whenever the process is killed.

    Raises RunFailure where the disk refuses, having left nothing.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunFailure(f"{path}: could not be written ({error.strerror})") from error


def drop_torn_line(path: Path) -> None:
    """Cut the half line that a killed process may have left, or the next one would join it."""
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)


def read(path: Path) -> list[tuple[int, Record]]:
    """The objects of the file with their line numbers; none if there is no such file.

    A half last line is passed over. Raises UserError naming any other line that is no object.
    """
    if not path.exists():
        return []
    # A write cut short can end inside a character, hence bytes: only whole lines must decode.
    lines = path.read_bytes().rstrip().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # brackets without end
            if number == len(lines):
                break  # the process was killed while it wrote this line
            raise UserError(
                f"{path}: line {number} is not valid JSON ({error}); remove the line"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not a JSON object; remove the line")
        records.append((number, record))
    return records


def of_final_weights(lines: Sequence[tuple[int, Record]]) -> list[tuple[int, Record]]:
    """The evaluations of the furthest weights: a run that was made longer has older ones, too."""
    furthest = max((record.get("step", 0) for _, record in lines), default=0)
    return [(number, record) for number, record in lines if record.get("step", 0) == furthest]


def require(record: Mapping[str, Any], keys: Sequence[str], path: Path, number: int) -> None:
    """Raises UserError where a line lacks what its reader needs."""
    missing = [key for key in keys if key not in record]
    if missing:
        raise UserError(f"{path}: line {number} lacks {', '.join(missing)}; remove the line")
