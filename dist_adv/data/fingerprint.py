"""What tells the images of a split from others, wherever they lie and however they are read."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

from torch import Tensor

from dist_adv import rng
from dist_adv.data.files import Listing, unusable

_LOOKED_INTO = 2000


class Fingerprint(TypedDict):
    """names: hash of what every image is called, or labelled, in order; contents: of the rest."""

    images: int
    classes: int
    names: str
    contents: str


Fingerprints = Mapping[str, Fingerprint | None]
"""By split; None for images that were made up."""


def in_words(found: Fingerprint | None) -> str | None:
    """Return a fingerprint on one line; None for images that were made up."""
    return found and f"{found['names']}-{found['contents']}"


def of_files(listing: Listing) -> Fingerprint:
    """Return the fingerprint of files: their paths, their sizes, the bytes of up to 2,000.

    Raises UserError for a file that cannot be read.
    """
    names = hashlib.sha256()
    start = len(os.path.join(listing.folder, ""))
    for path in listing.paths:
        names.update(os.fsencode(path[start:]) + b"\0")
    return Fingerprint(
        images=len(listing.paths),
        classes=len(listing.classes),
        names=names.hexdigest()[:16],
        contents=_contents(listing.sizes, lambda number: _digest(listing.paths[number])),
    )


def of_rows(
    labels: Sequence[int],
    classes: Sequence[str],
    sizes: Callable[[], Iterable[int]],
    content: Callable[[int], bytes],
) -> Fingerprint:
    """Return the fingerprint of a table: classes, labels, bytes of each image; those of 2,000 read.

    sizes: of all images in bytes; content: gives one's bytes. Neither columns nor files have names
    in it. Raises what these raise.
    """
    names = hashlib.sha256(json.dumps([classes, labels]).encode())
    return Fingerprint(
        images=len(labels),
        classes=len(classes),
        names=names.hexdigest()[:16],
        contents=_contents(list(sizes()), lambda number: hashlib.sha256(content(number)).digest()),
    )


def _contents(sizes: Sequence[int], digest: Callable[[int], bytes]) -> str:
    """Return a hash of all images' sizes, and of the digests of up to 2,000, always the same."""
    contents = hashlib.sha256()
    for size in sizes:
        contents.update(b"%d\0" % size)
    order = rng.permutation(rng.stream_key("fingerprint"), len(sizes))
    with ThreadPoolExecutor() as pool:
        for each in pool.map(digest, order[:_LOOKED_INTO].tolist()):
            contents.update(each)
    return contents.hexdigest()[:16]


def of_tensors(images: Tensor, labels: Tensor, classes: list[str]) -> Fingerprint:
    """Return the fingerprint of images in memory: their labels, all of their pixels."""
    names = hashlib.sha256(json.dumps([classes, labels.tolist()]).encode())
    contents = hashlib.sha256(images.numpy().tobytes())
    return Fingerprint(
        images=len(labels),
        classes=len(classes),
        names=names.hexdigest()[:16],
        contents=contents.hexdigest()[:16],
    )


def what_changed(before: Fingerprints, now: Fingerprints) -> list[str]:
    """Return in words what has changed, split by split; nothing where there was no fingerprint."""
    changes = []
    for split, old in before.items():
        new = now.get(split)
        if old is None or new is None or old == new:
            continue
        numbers = [
            f"{split}: {new[what]:,} {what} instead of {old[what]:,}"
            for what in ("images", "classes")
            if new[what] != old[what]
        ]
        kind = "names" if new["names"] != old["names"] else "contents"
        changes += numbers or [f"{split}: the same number of images, but other {kind}"]
    return changes


def _digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise unusable(path, error) from None
