"""Reads W&B's offline file: records of wandb_internal.proto in LevelDB's log format."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 32768
_FILE_HEADER = 7  # ":W&B", a magic number, a version
_FULL, _FIRST, _LAST = 1, 2, 4


def records(path: Path) -> Iterator[Record]:
    """Every record of a run-*.wandb file."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, pieces = _FILE_HEADER, []
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # a block's tail too short for a header is padding
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_FULL, _FIRST):
            pieces = []
        pieces.append(piece)
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(b"".join(pieces))
            yield record


def pieces(folder: Path) -> list[Path]:
    """The files of a run's starts under `folder`, the oldest first."""
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, row by row."""
    return [_values(r.history.item) for r in records(path) if r.HasField("history")]


def summary(path: Path) -> dict[str, Any]:
    """The last value of everything."""
    found: dict[str, Any] = {}
    for record in records(path):
        found |= _values(record.summary.update)
    return found


def settings(path: Path) -> dict[str, Any]:
    """The configuration."""
    found: dict[str, Any] = {}
    for record in records(path):
        found |= _values(record.run.config.update) | _values(record.config.update)
    return found


def _values(items: Iterable[Any]) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
