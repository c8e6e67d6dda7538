"""Where the pictures of a split lie: in files of a folder, in tar files, or in one array.

Those in columns of Arrow's: `hf.Rows`; in tar files of a store: `stores.StoreShards`.
"""

import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
from PIL import Image

from dist_adv.data.image import Framing, read
from dist_adv.text import shown

INDEX = np.dtype([("shard", "<u4"), ("label", "<u4"), ("length", "<u8"), ("offset", "<u8")])
"""A picture of a packed split: in which tar file its bytes are, and where."""

_HEADER = 512  # bytes of a tar file before each of its members


class Records(Protocol):
    """Pictures by number; `part` gives some of them, in another order.

    key: of the configuration, which a message names.
    """

    key: str

    def __len__(self) -> int: ...

    def read(self, number: int, framing: Framing, draws: np.ndarray | None) -> np.ndarray:
        """Return uint8 (H, W, C) of a picture, framed (`image.read`). Raises Unreadable."""

    def name(self, number: int) -> str:
        """Return what a message calls a picture."""

    def part(self, numbers: Sequence[int]) -> "Records": ...


class Encoded(ABC):
    """Pictures that are to be decoded."""

    key = "data.root"

    @abstractmethod
    def open(self, number: int) -> BinaryIO:
        """Return the file of a picture. Raises OSError, Unreadable."""

    def read(self, number: int, framing: Framing, draws: np.ndarray | None) -> np.ndarray:
        return read(partial(self.open, number), framing, draws)


class Mapped:
    """Pictures in one array, uint8 (N, H, W, C), which may be mapped from a file.

    called: what a message calls it. numbers: which of them, None for all.
    """

    key = "data.root"

    def __init__(self, array: np.ndarray, called: str, numbers: np.ndarray | None = None) -> None:
        self.array, self.called, self.numbers = array, called, numbers

    def __len__(self) -> int:
        return len(self.array if self.numbers is None else self.numbers)

    def read(self, number: int, framing: Framing, draws: np.ndarray | None) -> np.ndarray:
        pixels = self.array[number if self.numbers is None else self.numbers[number]]
        as_wanted = framing.size is None or pixels.shape[:2] == (framing.size,) * 2
        if as_wanted and draws is None:
            return pixels
        return framing(Image.fromarray(pixels), draws)

    def name(self, number: int) -> str:
        return f"{self.called}: image {number}"

    def part(self, numbers: Sequence[int]) -> "Mapped":
        some = np.asarray(numbers, dtype=np.int64)
        return Mapped(self.array, self.called, some if self.numbers is None else self.numbers[some])


class Paths(Encoded):
    """Pictures that are files."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, number: int) -> BinaryIO:
        return open(self.paths[number], "rb")

    def name(self, number: int) -> str:
        return shown(self.paths[number])

    def part(self, numbers: Sequence[int]) -> "Paths":
        return Paths([self.paths[k] for k in numbers])


class Shards(Encoded):
    """Pictures that lie in tar files.

    paths: of these. index: of dtype INDEX, one row a picture; it may be mapped from a file.
    """

    def __init__(self, paths: Sequence[Any], index: np.ndarray) -> None:
        self.paths, self.index = paths, index

    def __len__(self) -> int:
        return len(self.index)

    def open(self, number: int) -> BinaryIO:
        row = self.index[number]
        return io.BytesIO(self._read(int(row["shard"]), int(row["offset"]), int(row["length"])))

    def name(self, number: int) -> str:
        row = self.index[number]
        shard, offset = int(row["shard"]), int(row["offset"])
        place = f"{shown(self.paths[shard])}: record {number} at byte {offset}"
        try:
            header = self._read(shard, offset - _HEADER, 100)
        except OSError:
            return place
        return f"{place} ({shown(header.split(bytes(1))[0].decode(errors='replace'))})"

    def part(self, numbers: Sequence[int]) -> Self:
        return type(self)(self.paths, self.index[np.asarray(numbers, dtype=np.int64)])

    @abstractmethod
    def _read(self, shard: int, offset: int, length: int) -> bytes:
        """Return bytes of a tar file. Raises OSError."""


class DiskShards(Shards):
    """Pictures in tar files on a disk, read by position: no thread waits for another's seek."""

    def __init__(self, paths: Sequence[Path], index: np.ndarray) -> None:
        super().__init__(paths, index)
        self._opened: dict[int, int] = {}
        self._opening = threading.Lock()

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        with self._opening:
            file = self._opened.get(shard)
            if file is None:
                file = self._opened[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return os.pread(file, length, offset)

    def __del__(self) -> None:
        for file in self._opened.values():
            os.close(file)
