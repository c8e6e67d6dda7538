"""Folders of image files: which files they hold, and threads that read them ahead of use.

Threads and not processes: Pillow lets go of the interpreter while it decodes and resizes, which is
19 parts of 20 of the time that a photograph takes. So there is no worker to be killed, no shared
memory or socket to run out, and a signal to all processes of a run meets those that save it.
"""

import logging
import math
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_adv.data.image import Framing, Unreadable, extensions
from dist_adv.data.records import Records
from dist_adv.errors import RankFailure, UserError
from dist_adv.text import few, shown

log = logging.getLogger("dist_adv")
_Failure = type[UserError] | type[RankFailure]

_BATCHES_AHEAD = 4
# What systems put beside people's folders; names that begin with a dot are passed over, too.
_NOT_PEOPLES = frozenset({"__MACOSX", "@eaDir", "lost+found"})


class Files:
    """Pictures made images of one size, decoded when they are asked for.

    shape: (N, 3, H, W). A file that is no image or has another size is a UserError where images
    are loaded before a run, on every rank; a RankFailure where a rank meets it alone in the run.
    """

    def __init__(self, records: Records, framing: Framing, workers: int) -> None:
        self.records, self.framing, self.workers = records, framing, workers
        try:
            height, width, channels = self.pixels(0).shape
        except Unreadable as error:
            raise UserError(_complaint(records, 0, error, 1, 1)) from None
        self.shape: tuple[int, ...] = (len(records), channels, height, width)

    def pixels(self, sample: int, draws: np.ndarray | None = None) -> np.ndarray:
        """Return uint8 (H, W, C) of a sample (`Records.read`). Raises Unreadable."""
        return self.records.read(sample, self.framing, draws)

    @property
    def gigabytes(self) -> float:
        """Of all images, decoded."""
        return math.prod(self.shape) / 1e9

    def load(self, samples: Sequence[int], failure: _Failure = UserError) -> Tensor:
        """Return uint8 (n, 3, H, W) of these samples, read by as many threads as help."""
        with ThreadPoolExecutor() as pool:
            return _Reading(self, samples, pool, parts=64).result(failure)

    def __getitem__(self, samples: Tensor) -> Tensor:
        """Return uint8 (n, 3, H, W) of these samples, int64 (n,). Raises RankFailure."""
        return self.load(samples.tolist(), RankFailure)

    def all(self) -> Tensor:
        """Return uint8 (N, 3, H, W), contiguous."""
        return self.load(range(len(self.records))).contiguous()

    def ahead(
        self,
        batches: Iterable[Tensor],
        draw: Callable[[Tensor], Tensor] | None = None,
        pin: bool = False,
    ) -> Iterator[Tensor]:
        """Yield uint8 (n, 3, H, W) of each batch of samples, while `workers` threads read on.

        draw: gives samples (n,) what `image.read` draws by, (n, `Framing.drawn`, 4); None: centres.
        pin: into memory from which a GPU copies by itself. Raises RankFailure.
        """
        some = max(1, self.workers)
        pool = ThreadPoolExecutor(some)
        waiting: deque[_Reading] = deque()
        try:
            for samples in batches:
                draws = draw(samples) if draw else None
                waiting.append(_Reading(self, samples.tolist(), pool, some, pin, draws))
                if len(waiting) > (_BATCHES_AHEAD if self.workers else 0):
                    yield waiting.popleft().result(RankFailure)
            while waiting:
                yield waiting.popleft().result(RankFailure)
        finally:  # also where nobody wants the rest
            pool.shutdown(cancel_futures=True)

    def part(self, samples: Tensor) -> "Files":
        return Files(self.records.part(samples.tolist()), self.framing, self.workers)


class _Reading:
    """Images on their way into memory, each read by some thread into its place."""

    def __init__(
        self,
        files: Files,
        samples: Sequence[int],
        pool: ThreadPoolExecutor,
        parts: int,
        pin: bool = False,
        draws: Tensor | None = None,
    ) -> None:
        self.files, self.samples = files, samples
        _, channels, height, width = files.shape
        shape = (len(samples), height, width, channels)
        self.images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        rows = self.images.numpy()
        each: list[np.ndarray | None] = [None] * len(samples)
        if draws is not None:
            each = list(draws.numpy())
        self.jobs = [
            pool.submit(self._read, rows[part::parts], samples[part::parts], each[part::parts])
            for part in range(min(parts, len(samples)))
        ]

    def _read(
        self, rows: np.ndarray, samples: Sequence[int], draws: Sequence[np.ndarray | None]
    ) -> list[tuple[int, Unreadable]]:
        """Fill rows (n, H, W, 3); return what is wrong with which sample."""
        wrong = []
        for row, sample, drawn in zip(rows, samples, draws, strict=True):
            try:
                pixels = self.files.pixels(sample, drawn)
            except Unreadable as error:
                wrong.append((sample, error))
                continue
            if pixels.shape == row.shape:
                row[...] = pixels
            else:
                wrong.append((sample, _OtherSize(pixels.shape)))
        return wrong

    def result(self, failure: _Failure) -> Tensor:
        """Return uint8 (n, 3, H, W), once it is there; raise a failure for the first bad file."""
        wrong = [each for job in self.jobs for each in job.result()]
        if not wrong:
            return self.images.permute(0, 3, 1, 2)
        sample, error = min(wrong, key=lambda each: each[0])
        records = self.files.records
        if isinstance(error, _OtherSize):
            _, _, height, width = self.files.shape
            raise failure(
                f"data.size: {records.name(0)} ({width}x{height}) and {records.name(sample)} "
                f"({error.what}) have 2 different sizes; set data.size, for example data.size=32"
            )
        unreadable = [each for _, each in wrong if not isinstance(each, _OtherSize)]
        raise failure(_complaint(records, sample, error, len(unreadable), len(self.samples)))


class _OtherSize(Unreadable):
    """An image that does not fit in with the first one."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(f"{shape[1]}x{shape[0]}")


def _complaint(records: Records, number: int, error: Unreadable, count: int, of: int) -> str:
    name = f"{records.key}: {records.name(number)}"
    return f"{name}: {error.what} ({count} of {of} files read); {error.remedy}"


@dataclass(frozen=True)
class Listing:
    """The image files of one split, by class and then by path."""

    folder: Path
    classes: list[str]
    paths: list[str]
    sizes: list[int]
    labels: list[int]


def unusable(
    path: object, error: OSError | ValueError, remedy: str = "mend or remove it"
) -> UserError:
    """Return the line for a file or folder that the system refuses."""
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"data.root: {shown(path)}: {reason}; {remedy}")


def list_images(folder: Path) -> Listing:
    """Return what <class>/**/* below a folder holds, having said what was passed over.

    Raises UserError for a folder that cannot be read, that has no classes or a single one, for a
    class without images, and for what is neither a file nor a folder.
    """
    passed_over: Counter[str] = Counter()
    entries = list(_entries(str(folder), passed_over))
    classes = sorted(name for name, _, status in entries if stat.S_ISDIR(status.st_mode))
    if not classes:
        raise UserError(f"data.root: {shown(folder)}: Couldn't find any class folder")
    if len(classes) == 1:
        raise UserError(
            f"data.root: {shown(folder)}: has a single class, {shown(classes[0])}: there is "
            f"nothing to tell apart; it needs two folders or more"
        )
    with ThreadPoolExecutor() as pool:  # on a network disk every look at a file is a wait
        found = list(pool.map(_below, (os.path.join(folder, name) for name in classes)))
    empty = [name for name, (files, _) in zip(classes, found, strict=True) if not files]
    if empty:
        raise UserError(
            f"data.root: {shown(folder)}: no valid file for the classes {few(empty)}; image files "
            f"end in {few(sorted(extensions()), 50)}"
        )
    passed_over += sum((passed for _, passed in found), Counter(_no_classes(entries)))
    if passed_over:
        what = [f"{shown(name)} ({count})" for name, count in passed_over.most_common()]
        log.info("data.root: %s: passed over: %s", shown(folder), few(what))
    return Listing(
        folder,
        classes,
        [os.path.join(place, name) for files, _ in found for place, name, _ in files],
        [size for files, _ in found for _, _, size in files],
        [label for label, (files, _) in enumerate(found) for _ in files],
    )


_Entry = tuple[str, str, os.stat_result]
"""Name, path, and what it is; links are followed."""


def _entries(folder: str, passed_over: Counter[str]) -> Iterator[_Entry]:
    """Yield what a folder holds and is not hidden. Raises UserError for what cannot be read."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if not name.startswith(".") and name not in _NOT_PEOPLES:
                    yield name, entry.path, _status(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    passed_over[f"hidden {name}"] += 1
                else:
                    passed_over["hidden files"] += 1
    except OSError as error:
        raise unusable(folder, error) from None


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise unusable(path, error) from None


def _below(top: str) -> tuple[list[tuple[str, str, int]], Counter[str]]:
    """Return folder, name and size of each image below a class's folder, sorted; and the rest.

    Raises UserError, also for links in a circle.
    """
    found, passed_over = [], Counter[str]()
    start = _status(top)
    to_do: list[tuple[str, tuple[tuple[int, int], ...]]]
    to_do = [(top, ((start.st_dev, start.st_ino),))]
    while to_do:
        folder, above = to_do.pop()
        for name, path, status in _entries(folder, passed_over):
            if stat.S_ISDIR(status.st_mode):
                identity = status.st_dev, status.st_ino
                if identity in above:
                    raise UserError(
                        f"data.root: {shown(path)}: is a link to a folder that it lies in; "
                        f"remove it"
                    )
                to_do.append((path, (*above, identity)))
            elif _ending(name) not in extensions():
                passed_over[f"*{_ending(name)}"] += 1
            elif stat.S_ISREG(status.st_mode):
                found.append((folder, name, status.st_size))
            else:
                raise UserError(f"data.root: {shown(path)}: is no regular file; remove it")
    return sorted(found), passed_over


def _no_classes(entries: Iterable[_Entry]) -> Iterator[str]:
    """Yield the kinds of files that lie beside the classes' folders."""
    for name, _, status in entries:
        if not stat.S_ISDIR(status.st_mode):
            yield f"*{_ending(name)} beside the classes"


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()
