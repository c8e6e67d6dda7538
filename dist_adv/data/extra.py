"""Generated images beside the real ones: mapped and not read, so that 50 million take no memory."""

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dist_adv import rng
from dist_adv.data.datasets import DataOptions, Dataset, Extra
from dist_adv.data.files import Files
from dist_adv.data.fingerprint import Fingerprint
from dist_adv.data.image import Framing
from dist_adv.data.packed import IMAGES, LABELS
from dist_adv.data.records import Mapped
from dist_adv.errors import UserError
from dist_adv.text import shown

_LOOKED_INTO = 2000


def with_extra(real: Dataset, options: DataOptions) -> Dataset:
    """Return a training split with the generated images that `data.extra` names, or as it is.

    Raises UserError for a file that is missing, compressed or damaged, and for images or labels
    that do not go with the real ones.
    """
    if options.extra is None:
        return real
    path = Path(os.path.expanduser(options.extra.path))
    try:
        images, labels = _of_folder(path) if path.is_dir() else _of_npz(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"data.extra.path: {shown(path)}: {reason}") from None
    _check(path, images, labels, real)
    framing = Framing(randaugment=options.framing("train").randaugment)
    files = Files(Mapped(images, shown(path)), framing, options.workers)
    extra = Extra(
        files,
        torch.from_numpy(labels.astype(np.int64)),
        options.extra.fraction,
        _fingerprint(images, labels, len(real.classes)),
    )
    return replace(real, extra=extra)


def _of_folder(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the arrays of a pack's split, or of its training split."""
    folder = path / "train" if (path / "train").is_dir() else path
    if not (folder / IMAGES).exists():
        raise ValueError("no pack of pixels; make one with `dist-adv pack --raw`")
    return np.load(folder / IMAGES, mmap_mode="r"), np.load(folder / LABELS)


def _of_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return `image`, mapped, and `label` of an .npz file, as DM-Improves-AT has them."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        if not {"image.npy", "label.npy"} <= names:
            raise ValueError(f"has {', '.join(sorted(names))}; image.npy and label.npy are needed")
        member = archive.getinfo("image.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(
                "is compressed and cannot be mapped; write it again with np.savez, which is not"
            )
        with archive.open("image.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            header = file.tell()
        with archive.open("label.npy") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
    if fortran:
        raise ValueError(
            "image.npy is in Fortran's order; write it again with np.ascontiguousarray"
        )
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # of a local header: the lengths of what follows it
        name, more = np.frombuffer(file.read(4), "<u2")
    start = member.header_offset + 30 + int(name) + int(more) + header
    return np.memmap(path, dtype, "r", start, shape), labels


def _check(path: Path, images: np.ndarray, labels: np.ndarray, real: Dataset) -> None:
    channels, *size = real.images.shape[1:]
    shape = (*size, channels)
    problem = ""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
        problem = f"images are {images.dtype} {images.shape} and {real.name}'s uint8 (N, *{shape})"
    elif labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not len(images):
        problem = f"labels are {labels.dtype} {labels.shape} of {len(images)} images"
    elif labels.min() < 0 or labels.max() >= len(real.classes):
        problem = (
            f"labels go from {labels.min()} to {labels.max()} and {real.name} has "
            f"{len(real.classes)} classes"
        )
    if problem:
        raise UserError(f"data.extra.path: {shown(path)}: {problem}")


def _fingerprint(images: np.ndarray, labels: np.ndarray, classes: int) -> Fingerprint:
    """Of all labels, and of the pixels of up to 2,000 images, always the same ones."""
    some = rng.permutation(rng.stream_key("fingerprint"), len(images))[:_LOOKED_INTO]
    contents = hashlib.sha256()
    for number in some.tolist():
        contents.update(images[number].tobytes())
    return Fingerprint(
        images=len(images),
        classes=classes,
        names=hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()[:16],
        contents=contents.hexdigest()[:16],
    )
