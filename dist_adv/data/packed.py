"""Packs: a folder of images as a few large files, and an index that says where each image is.

A split of a pack is tar files, which `tar`, WebDataset and DALI read as well, `index.npy` with a
row an image (`records.INDEX`), and `index.json` with the classes and the SHA-256 of every file.
Small images of one size may be one array instead, `images.npy`, which is mapped and not read.

A pack lies on a disk or in a store (`stores.py`), in which it is read by position.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from dist_adv import files as on_disk
from dist_adv.data.files import Files, unusable
from dist_adv.data.fingerprint import Fingerprint
from dist_adv.data.image import Framing
from dist_adv.data.records import INDEX, DiskShards, Mapped, Records
from dist_adv.data.stores import REMEDY, StorePath, StoreShards
from dist_adv.errors import UserError
from dist_adv.text import shown

IMAGES, LABELS, ROWS = "images.npy", "labels.npy", "index.npy"
INDEX_FILE, BEGUN = "index.json", "packing.json"
Place = Path | StorePath


class PackedFile(BaseModel):
    name: str
    bytes: int
    sha256: str


class PackIndex(BaseModel):
    """index.json of a split.

    source: hash of the packed files' names and sizes. files: index.npy and the tar files, or the
    arrays.
    """

    format: Literal["dist-adv pack 1"] = "dist-adv pack 1"
    images: int
    classes: list[str]
    how: dict[str, Any]
    source: str
    files: list[PackedFile]


@dataclass(frozen=True)
class Stored:
    """A split that lies in files. labels: int64 (N,); fingerprint: may take a while to tell."""

    files: Files
    labels: Tensor
    classes: list[str]
    fingerprint: Callable[[], Fingerprint]


def open_pack(folder: Place, framing: Framing, workers: int) -> Stored:
    """Return a split of a pack, of which only the index has been read.

    Raises UserError for one that is missing, unfinished or damaged, as far as that shows without
    reading it all (`check_pack`).
    """
    index = read_index(folder)
    names = [file.name for file in index.files]
    if IMAGES in names and isinstance(folder, StorePath):
        raise UserError(
            f"data.root: {shown(folder)}: is a pack of pixels, which are mapped from a disk; copy "
            f"it to one, or pack without --raw"
        )
    with ThreadPoolExecutor() as pool:  # in a store every look at a file is a wait
        list(pool.map(partial(_check_size, folder), index.files))
    if IMAGES in names:
        labels = _load(folder / LABELS)
        records: Records = Mapped(_load(folder / IMAGES), shown(folder / IMAGES))
    else:
        rows = _load(folder / ROWS)
        _check_rows(folder, rows, index)
        tars = [name for name in names if name.endswith(".tar")]
        labels = rows["label"]
        if isinstance(folder, StorePath):
            records = StoreShards([folder / name for name in tars], rows)
        else:
            records = DiskShards([folder / name for name in tars], rows)
    sums = [[file.name, file.sha256] for file in index.files]
    found = Fingerprint(
        images=index.images,
        classes=len(index.classes),
        names=hashlib.sha256(json.dumps(index.classes).encode()).hexdigest()[:16],
        contents=hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16],
    )
    files = Files(records, framing, workers)
    numbers = torch.from_numpy(labels.astype(np.int64))
    return Stored(files, numbers, index.classes, lambda: found)


def check_pack(folder: Place, progress: Callable[[int], object] = lambda done: None) -> None:
    """Read a split of a pack whole. Raises UserError where a file is not what was packed."""
    index = read_index(folder)
    for file in index.files:
        path = folder / file.name
        _check_size(folder, file)
        if _sha256(path) != file.sha256:
            raise UserError(
                f"data.root: {shown(path)}: is not what was packed (its SHA-256 is another); pack "
                f"it again, or restore the file"
            )
        progress(file.bytes)


def read_index(folder: Place) -> PackIndex:
    """Return the index of a split. Raises UserError."""
    path = folder / INDEX_FILE
    try:
        return PackIndex.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        begun = (folder / BEGUN).exists()
        problem = "its packing has not ended" if begun else "no split of a pack"
        remedy = "give the same `dist-adv pack` again" if begun else "make one with `dist-adv pack`"
        raise UserError(f"data.root: {shown(folder)}: {problem}; {remedy}") from None
    except OSError as error:
        raise _refused(path, error) from None
    except (ValueError, RecursionError):  # pydantic's errors are ValueErrors
        raise UserError(f"data.root: {shown(path)}: is no index of a pack; restore it") from None


def _load(path: Place) -> np.ndarray:
    try:
        if isinstance(path, StorePath):
            return np.load(io.BytesIO(path.read_bytes()))
        return np.load(path, mmap_mode="r")
    except OSError as error:
        raise _refused(path, error) from None
    except ValueError as error:
        raise UserError(
            f"data.root: {shown(path)}: is no array ({error}); restore it, or pack it again"
        ) from None


def _check_size(folder: Place, file: PackedFile) -> None:
    path = folder / file.name
    try:
        found = path.size() if isinstance(path, StorePath) else os.path.getsize(path)
    except OSError as error:
        raise _refused(path, error) from None
    if found not in (file.bytes, None):
        raise UserError(
            f"data.root: {shown(path)}: has {found:,} bytes and the index says {file.bytes:,}; "
            f"copy it again"
        )


def _sha256(path: Place) -> str | None:
    if not isinstance(path, StorePath):
        return on_disk.sha256(path)
    try:
        return path.sha256()
    except OSError as error:
        raise _refused(path, error) from None


def _refused(path: Place, error: OSError) -> UserError:
    return unusable(path, error, REMEDY if isinstance(path, StorePath) else "mend or remove it")


def _check_rows(folder: Place, rows: np.ndarray, index: PackIndex) -> None:
    """Raise UserError where a row names what is not there."""
    sizes = np.array([file.bytes for file in index.files if file.name.endswith(".tar")])
    problem = ""
    if rows.dtype != INDEX or len(rows) != index.images:
        problem = f"has {len(rows)} rows of {rows.dtype}"
    elif (rows["shard"] >= len(sizes)).any() or (rows["label"] >= len(index.classes)).any():
        problem = "names a tar file or a class that there is not"
    elif (rows["offset"] + rows["length"] > sizes[rows["shard"]]).any():
        problem = "names bytes behind the end of a tar file"
    if problem:
        raise UserError(f"data.root: {shown(folder / ROWS)}: {problem}; pack it again")
