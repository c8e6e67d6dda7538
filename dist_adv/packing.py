"""`dist-adv pack`: a folder of images becomes a pack, a few large files (`data/packed.py`)."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dist_adv import files as on_disk
from dist_adv.data.files import Listing, list_images
from dist_adv.data.image import Framing, Unreadable, decode
from dist_adv.data.packed import BEGUN, IMAGES, INDEX_FILE, LABELS, ROWS, PackedFile, PackIndex
from dist_adv.data.records import INDEX
from dist_adv.errors import RunFailure, UserError
from dist_adv.terminal import bar
from dist_adv.text import shown

_BLOCK = 512  # of a tar file
_AT_ONCE = 256  # images in memory while they are packed

_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True)
class How:
    """How a split is packed.

    size: pictures are saved as JPEG of `quality`, those whose shorter side is longer than this
    resized to it; None keeps every file as it is. shard_mb: of the source files in a tar file, at
    most. raw: as one array of images of size x size, None: of the size that all have.
    """

    size: int | None = None
    quality: int = 95
    shard_mb: int = 1024
    raw: bool = False


def run_pack(source: Path, out: Path, how: How) -> dict[str, int]:
    """Pack `source`/train and `source`/test into `out`; return how many images each has.

    Raises as `pack` does, before anything is packed where either folder is missing.
    """
    for split in ("train", "test"):
        if not (source / split).is_dir():
            raise UserError(
                f"{source / split}: is no folder; a source has train/<class>/ and test/<class>/"
            )
    counts = {}
    with bar(True) as progress:
        for split in ("train", "test"):
            task = progress.add_task(f"packing {split}", status="")

            def show(done: int, of: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=of)

            counts[split] = pack(source / split, out / split, how, show)
    return counts


def pack(
    source: Path, out: Path, how: How, progress: Callable[[int, int], object] = lambda n, of: None
) -> int:
    """Pack one split, `source`/<class>/..., into the folder `out`; return its number of images.

    Killed and called again it goes on behind the last tar file that was whole. Nothing that is
    there is replaced.

    Args:
        progress: called with the images done and all of them.

    Raises:
        UserError: there are no images, one cannot be read, or `out` has another pack.
        RunFailure: the disk refuses.
    """
    listing = list_images(source)
    told: dict[str, Any]
    told = {"how": vars(how), "source": hashlib.sha256(_told(listing)).hexdigest()}
    _begin(out, told)
    if (out / INDEX_FILE).exists():
        return len(listing.paths)
    try:
        names = (_pack_raw if how.raw else _pack_shards)(listing, out, how, progress)
        found = [PackedFile(name=name, **_about(out / name)) for name in names]
    except OSError as error:
        raise RunFailure(f"{out}: could not be written ({error.strerror})") from error
    count = len(listing.paths)
    index = PackIndex(images=count, classes=listing.classes, files=found, **told)
    # Not pydantic's JSON, which knows no names that are no UTF-8.
    on_disk.replace(out / INDEX_FILE, json.dumps(index.model_dump(), indent=1).encode())
    (out / BEGUN).unlink(missing_ok=True)
    for part in out.glob("*.part.npy"):
        part.unlink()
    return count


def _told(listing: Listing) -> bytes:
    start = len(os.path.join(listing.folder, ""))
    names = [path[start:] for path in listing.paths]
    return json.dumps([names, listing.sizes]).encode()


def _begin(out: Path, told: dict[str, Any]) -> None:
    """Make the folder of a split, or find the one of the same command. Raises UserError."""
    path, finished = out / BEGUN, out / INDEX_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if finished.exists():
            known = told.items() <= json.loads(finished.read_bytes()).items()
        elif path.exists():
            known = json.loads(path.read_bytes()) == told
        else:
            known = not any(out.iterdir())
    except OSError as error:
        raise UserError(f"{shown(out)}: {error.strerror}; name another folder") from None
    except ValueError:
        known = False
    if not known:
        raise UserError(
            f"{shown(out)}: has something else in it, or a pack of other images or settings; name "
            f"another folder"
        )
    if not finished.exists():
        on_disk.replace(path, json.dumps(told).encode())


def _about(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": on_disk.sha256(path)}


def _pack_shards(
    listing: Listing, out: Path, how: How, progress: Callable[[int, int], object]
) -> list[str]:
    """Write the tar files that are not there yet, and the index; return their names."""
    names, parts = [], []
    for number, span in enumerate(_spans(listing.sizes, how.shard_mb * 10**6)):
        name = f"{number:05d}.tar"
        rows = out / f"{name}.part.npy"  # written last
        if not rows.exists():
            part = _write_shard(listing, span, out / name, how, number)
            buffer = io.BytesIO()
            np.save(buffer, part)
            on_disk.replace(rows, buffer.getvalue())
        names.append(name)
        parts.append(np.load(rows))
        progress(span.stop, len(listing.paths))
    with (out / ROWS).open("wb") as file:
        np.save(file, np.concatenate(parts))
        file.flush()
        os.fsync(file.fileno())
    return [ROWS, *names]


def _spans(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Yield which images go into each tar file: as many as their files fit."""
    start = total = 0
    for number, size in enumerate(sizes):
        if total and total + size > limit:
            yield range(start, number)
            start, total = number, 0
        total += size
    yield range(start, len(sizes))


def _write_shard(listing: Listing, span: range, path: Path, how: How, shard: int) -> np.ndarray:
    """Write one tar file whole; return its rows of the index."""
    rows = np.zeros(len(span), INDEX)
    partly, start = path.with_name(f".partial-{path.name}"), len(os.path.join(listing.folder, ""))
    taken: set[str] = set()
    with partly.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for k, (number, content, suffix) in enumerate(_contents(listing, span, how)):
                name, label = listing.paths[number][start:], listing.labels[number]
                key = _key(name, number, taken)
                _add(tar, key + (suffix or os.path.splitext(name)[1]), content)
                ends = tar.offset - -len(content) % _BLOCK
                rows[k] = shard, label, len(content), ends - len(content)
                _add(tar, f"{key}.cls", str(label).encode())
        file.flush()
        os.fsync(file.fileno())
    partly.replace(path)
    return rows


def _key(name: str, number: int, taken: set[str]) -> str:
    """Return the name of a picture's two members but for their endings, of its own in this file.

    To WebDataset the name ends at the first dot of a file, and what has one name is one sample.
    """
    folder, file = os.path.split(os.path.splitext(name)[0])
    key = os.path.join(folder, file.replace(".", "-"))
    while key in taken:
        key += f"-{number}"
    taken.add(key)
    return key


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _contents(listing: Listing, span: range, how: How) -> Iterator[tuple[int, bytes, str]]:
    """Yield number, bytes and new ending (or none) of each image, a few of them read ahead."""

    def content(number: int) -> tuple[int, bytes, str]:
        path = listing.paths[number]
        pixels = _pixels(path, Framing())  # so that no pack has a damaged image
        if how.size is None:
            return number, Path(path).read_bytes(), ""
        return number, _resized(pixels, how.size, how.quality), ".jpg"

    return _in_order(content, span)


def _in_order(work: Callable[[_ItemT], _ResultT], items: Sequence[_ItemT]) -> Iterator[_ResultT]:
    """Yield what threads make of each item, of a few hundred at a time, or memory would fill."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), _AT_ONCE):
            yield from pool.map(work, items[start : start + _AT_ONCE])


def _pixels(path: str, framing: Framing) -> np.ndarray:
    """Return uint8 (H, W, 3) of a file. Raises UserError."""
    try:
        return decode(path, framing)
    except Unreadable as error:
        raise UserError(f"{shown(path)}: {error.what}; {error.remedy}") from None


def _resized(pixels: np.ndarray, size: int, quality: int) -> bytes:
    """Return a picture as JPEG, its shorter side no longer than `size`."""
    image = Image.fromarray(pixels)
    ratio = size / min(image.size)
    if ratio < 1:
        width, height = (round(side * ratio) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _pack_raw(
    listing: Listing, out: Path, how: How, progress: Callable[[int, int], object]
) -> list[str]:
    """Write all images as one array, and their labels; return the files' names."""
    pixels = partial(_pixels, framing=Framing(how.size))
    first, count = pixels(listing.paths[0]), len(listing.paths)
    partly = out / f".partial-{IMAGES}"
    array = np.lib.format.open_memmap(partly, "w+", np.uint8, (count, *first.shape))
    for number, image in enumerate(_in_order(pixels, listing.paths)):
        if image.shape != first.shape:
            raise UserError(
                f"{shown(listing.paths[number])}: is {image.shape[1]}x{image.shape[0]} and the "
                f"first image {first.shape[1]}x{first.shape[0]}; give --size"
            )
        array[number] = image
        if number % 1000 == 999 or number == count - 1:
            progress(number + 1, count)
    array.flush()
    partly.replace(out / IMAGES)
    np.save(out / LABELS, np.array(listing.labels, dtype=np.int64))
    return [LABELS, IMAGES]
