"""Reads W&B's offline file: records of wandb_internal.proto in LevelDB's log format."""

from collections.abc import Iterator
from pathlib import Path

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
