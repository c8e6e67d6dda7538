"""Image data sets as uint8 tensors, whole; large image folders as files.

`cifar10`, `cifar100` and `svhn` come through torchvision, which checks their MD5 sums; `digits`
is embedded in scikit-learn; `imagefolder` is any folder with `train/<class>/` and
`test/<class>/`; `packed` is what `dist-adv pack` has made of one. The root is `data.root`, else
the environment variable DIST_ADV_DATA, else `data`. `hf` comes through Hugging Face's `datasets`.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor

from dist_adv import packages, plugins, rng
from dist_adv.data import fingerprint
from dist_adv.data.augment import Augmentation
from dist_adv.data.files import Files, list_images
from dist_adv.data.fingerprint import Fingerprint, in_words
from dist_adv.data.hf import HfSource, open_rows
from dist_adv.data.image import Framing
from dist_adv.data.packed import Stored, open_pack
from dist_adv.data.randaugment import RandAugment
from dist_adv.data.records import Paths
from dist_adv.data.stores import StorePath, is_store, open_store
from dist_adv.errors import UserError
from dist_adv.options import TUPLE, Open, Options, PositiveInt, Real, Share
from dist_adv.text import shown

NAMES = ("cifar10", "cifar100", "svhn", "imagefolder", "packed", "hf", "digits")
MIRRORED = frozenset(NAMES) - {"svhn", "digits"}
"""Those of which a mirror image is of the same class."""
FOLDERS = ("imagefolder", "packed", "hf")
GROUP = "dist_adv.data"


class ExtraOptions(Options):
    """Generated images to train on besides: path of an .npz file with `image`, uint8 (N, H, W, C),
    and `label`, or of a pack of pixels. fraction: their share of every batch. An epoch has as many
    batches as without them, all of them full."""

    path: str
    fraction: Annotated[Real, Field(gt=0, lt=1)] = 0.7


class DataOptions(Options):
    """Which images. `augment`: the set's usual random crop, and flip where that means the same.

    false: nothing of what is below that changes training images at random either."""

    name: str = "cifar10"
    root: str | None = None
    augment: bool = True
    crop_padding: Annotated[int, Field(ge=0, le=64)] | None = None
    """Black pixels around an image before it is cropped at random (null: the data set's usual, an
    eighth of its width; 0: no crop). Short runs like less."""
    crop_shift: Annotated[int, Field(ge=0)] = 0
    """CropShift in place of that crop: up to so many rows and columns together are cut off, and the
    rest lies anywhere over black (0: off; 11 of 32 in the paper)."""
    jitter: Share = 0.0
    """Brightness, contrast and saturation, in this order, each times a factor within this of 1."""
    erase: Share = 0.0
    """The share of training images of which a rectangle of 2 to 33 % is made black."""
    mixup: Annotated[Real, Field(ge=0)] = 0.0
    """alpha: image p of a batch of B is blended with (p + B/2) mod B by a share that is drawn for
    the batch from Beta(alpha, alpha), and so are their labels (0: off)."""
    cutmix: Annotated[Real, Field(ge=0)] = 0.0
    """alpha: likewise, a box is put in place of being blended. With both a batch has either."""
    randaugment: RandAugment | None = None
    """Of folders and packs whose training split is read as it is used."""
    drop_last: bool = False
    validation: Annotated[int, Field(ge=0)] = 0
    """Training images held out, always the same; the curve and the best epoch are of them then."""
    size: PositiveInt | None = None
    """Of files: resize the shorter side and crop the centre to size x size."""
    shorter: PositiveInt | None = None
    """What the shorter side is resized to before that (null: size). ImageNet's is 256 for 224."""
    crop_scale: Annotated[tuple[Share, Share], TUPLE] | None = None
    """Train on boxes at random with this share of a picture's area, resized (RandomResizedCrop;
    [0.08, 1] is usual), not on crops with borders. Such a split is always read as it is used."""
    resident_gb: Annotated[Real, Field(ge=0)] = 8.0
    """Of files: a split that is larger once decoded stays on disk and is read as it is used."""
    workers: Annotated[int, Field(ge=0, le=256)] = 4
    """Threads of each rank that read such a split ahead of training (0: as it is needed)."""
    extra: ExtraOptions | None = None

    @model_validator(mode="after")
    def _of_folders(self) -> Self:
        if self.name in NAMES and self.name not in FOLDERS:
            for key in ("size", "shorter", "crop_scale"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key}: the images of {self.name} are not resized; leave it out"
                    )
        elif self.name not in FOLDERS:  # whose class may read `size` itself
            for key in ("shorter", "crop_scale"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: is of pictures in folders and packs; leave it out")
        for key in ("shorter", "crop_scale"):
            if getattr(self, key) is not None and self.size is None:
                raise ValueError(f"{key}: needs data.size, the size that images have afterwards")
        if self.shorter is not None and self.size is not None and self.shorter < self.size:
            raise ValueError(f"shorter: {self.shorter} is less than data.size={self.size}")
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError("crop_scale: give the least and the largest share, like [0.08, 1]")
        return self

    @model_validator(mode="after")
    def _one_crop(self) -> Self:
        if self.crop_shift and self.crop_scale:
            raise ValueError("crop_shift: is a crop, and crop_scale is another; leave one out")
        if self.crop_shift and self.crop_padding:
            raise ValueError("crop_shift: takes the place of crop_padding; leave that out")
        if self.randaugment and self.name not in FOLDERS:
            raise ValueError(
                f"randaugment: is done to pictures as they are read, and those of {self.name} are "
                f"in memory; leave it out, or use one of {', '.join(FOLDERS)}"
            )
        return self

    def augmentation(self) -> Augmentation:
        """Return what is done to a batch of the training split on the device."""
        if not self.augment:
            return Augmentation()
        return Augmentation(self.crop_shift, self.jitter, self.erase, self.mixup, self.cutmix)

    def framing(self, split: str) -> Framing:
        """Return how the pictures of a split become images of one size."""
        if split == "train" and self.augment:
            return Framing(self.size, self.shorter, self.crop_scale, self.randaugment)
        return Framing(self.size, self.shorter)


class HfOptions(HfSource, DataOptions):
    """Images of Hugging Face's `datasets`."""

    name: str = "hf"

    @model_validator(mode="after")
    def _has_a_path(self) -> Self:
        if self.root is not None:
            raise ValueError("root: hf has data.path instead; leave it out")
        return self


_OWN: dict[str, type[DataOptions]] = {**dict.fromkeys(NAMES, DataOptions), "hf": HfOptions}


def find_options(name: str) -> type[DataOptions]:
    """Return the options of a data set: dist_adv's own, a package's, or that of a reference.

    Raises ValueError where there is none, saying why.
    """
    if name in _OWN:
        return _OWN[name]
    found = plugins.find(name, GROUP, _OWN)
    return plugins.options_of(name, found, DataOptions)


RESIZING = frozenset({"size", "shorter", "crop_scale", "randaugment"})
"""Keys of pictures, whose sizes differ."""


def keys_for_another(keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return those keys of a section `data` that hold for the images of the data set `name`, too.

    All of the same set; of another, how images are used, not where they are (`root`, options of one
    set), nor how they are resized where it has one size. Generated images stay: where they do not
    fit, loading them says so.
    """
    if keys.get("name", DataOptions.model_fields["name"].default) == name:
        return dict(keys)
    left = {"name", "root"}
    if name in NAMES and name not in FOLDERS:
        left |= RESIZING
    return {key: keys[key] for key in keys if key in DataOptions.model_fields.keys() - left}


DataChoice = Annotated[
    SerializeAsAny[DataOptions],
    Open(lambda: _OWN, find_options, usual="cifar10"),
]
"""The section `data` of a configuration."""


@dataclass(frozen=True)
class Extra:
    """Generated images. fraction: their share of every batch."""

    files: Files
    labels: Tensor
    fraction: float
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Dataset:
    """One split. images: uint8 (N, C, H, W), or files that give it; labels: int64 (N,). CPU."""

    name: str
    images: Tensor | Files
    labels: Tensor
    classes: list[str]
    crop_padding: int
    flip: bool
    fingerprint: Fingerprint | None = None
    """Of the whole split; None for images that were made up."""
    extra: Extra | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def known_by(self) -> dict[str, Any]:
        """Return what records tell these images by: a fingerprint, height and width, and the side
        that the shorter one of a picture had before the centre was cut out.
        """
        size = list(self.images.shape[2:])
        shorter = self.images.framing.shorter if isinstance(self.images, Files) else None
        known = {"fingerprint": in_words(self.fingerprint), "size": size}
        return known | {"shorter": shorter or min(size)}

    def hold_out(self, n: int) -> tuple["Dataset", "Dataset"]:
        """Return (the rest, n images that depend on nothing but how many images there are).

        Raises UserError where nothing would be left.
        """
        if n >= len(self):
            raise UserError(
                f"data.validation: {n} images to hold out of {len(self)}; use a smaller number"
            )
        order = rng.permutation(rng.stream_key("validation"), len(self))
        rest, held = order[n:].sort().values, order[:n]
        return self._part(rest), replace(self._part(held), extra=None)

    def _part(self, samples: Tensor) -> "Dataset":
        images = self.images
        chosen = images.part(samples) if isinstance(images, Files) else images[samples]
        return replace(self, images=chosen, labels=self.labels[samples])

    def framed(self, options: DataOptions) -> "Dataset":
        """Return the training split with its pictures made images as these options say.

        Raises UserError where the images are of one size.
        """
        framing = options.framing("train")
        if not isinstance(self.images, Files):
            raise UserError(f"data.size: the images of {self.name} have one; leave it out")
        if framing == self.images.framing:
            return self
        images = Files(self.images.records, framing, self.images.workers)
        return replace(self, images=images, crop_padding=_border(images, options))

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation a channel, in pixel units of [0, 1]."""
        if self.name in STATISTICS:
            return STATISTICS[self.name]
        # Of some images where all would have to be read. Exact from the 256 counts a channel; no
        # float copy of the images.
        images = self.images
        if isinstance(images, Files):
            some = rng.permutation(rng.stream_key("statistics"), len(self))
            images = images.load(some[:_IMAGES_FOR_STATISTICS].tolist())
        values = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in range(images.shape[1]):
            counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
            mean = (counts @ values) / counts.sum()
            means.append(mean.item())
            variance = (counts @ (values - mean) ** 2) / counts.sum()
            stds.append(max(variance.sqrt().item(), 1 / 255))
        return means, stds


_IMAGES_FOR_STATISTICS = 2000
STATISTICS = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    "svhn": ([0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970]),
}


def data_root(options: DataOptions) -> Path:
    """Where the files are, or will be downloaded to. Raises UserError for a store."""
    root = _root(options)
    if is_store(root):
        raise UserError(
            f"data.root: {shown(root)}: of what lies in a store packs alone are read; name a "
            f"folder, or make a pack and set data.name=packed"
        )
    return Path(os.path.expanduser(root))  # Path's own fails where there is no home


def pack_root(options: DataOptions) -> Path | StorePath:
    """Return where a pack is. Raises UserError for a store that nothing is known of."""
    root = _root(options)
    return open_store(root) if is_store(root) else data_root(options)


def _root(options: DataOptions) -> str:
    return options.root or os.environ.get("DIST_ADV_DATA") or "data"


def place_key(name: str) -> str:
    """Return the key that says where the images of a data set are."""
    return "data.path" if name == "hf" else "data.root"


def load_dataset(
    options: DataOptions,
    split: Literal["train", "test"],
    main_process_first: Callable[[], AbstractContextManager[None]] = nullcontext,
    as_files: bool = False,
) -> Dataset:
    """Return the images and labels of a split.

    `main_process_first` lets one process a node download and unpack while the others wait.
    as_files: leave pictures that lie in files where they are, to be `framed` anew.

    Raises UserError for a folder that is missing, empty or damaged, and for a failed download.
    """
    if options.name == "digits":
        data = _digits(split)
    elif options.name in FOLDERS:
        data = _of_files(stored(options, split, main_process_first), options, as_files)
    elif options.name not in NAMES:
        with main_process_first():
            data = _somebodys(options, split)
    else:
        with main_process_first():
            data = _torchvision(options.name, data_root(options), split)
    if data.fingerprint is None:
        assert isinstance(data.images, Tensor)
        found = fingerprint.of_tensors(data.images, data.labels, data.classes)
        data = replace(data, fingerprint=found)
    if options.crop_padding is None:
        return data
    return replace(data, crop_padding=options.crop_padding)


def _digits(split: str) -> Dataset:
    """scikit-learn's 1,797 scanned digits, 8x8 with 17 grey levels; every fifth is for testing."""
    packages.need("sklearn", "data.name: digits", "scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 4
    chosen = test if split == "test" else ~test
    classes = [str(digit) for digit in range(10)]
    return Dataset("digits", images[chosen], labels[chosen], classes, crop_padding=1, flip=False)


def _torchvision(name: str, root: Path, split: str) -> Dataset:
    from torchvision import datasets

    reason = _why_not(root)
    if reason:
        raise UserError(
            f"data.root: {name} in {shown(root)}: no such folder{reason}; set data.root or "
            f"DIST_ADV_DATA"
        )
    train, existed = split == "train", root.exists()
    try:
        if name == "svhn":
            source = datasets.SVHN(root, split=split, download=True)
            images, labels = torch.from_numpy(source.data), source.labels
            classes = [str(digit) for digit in range(10)]
        else:
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            source = kind(root, train=train, download=True)
            images = torch.from_numpy(source.data).permute(0, 3, 1, 2)
            labels, classes = source.targets, source.classes
    except (OSError, RuntimeError) as error:
        # torchvision downloads again what fails its checksum, so here the download failed too.
        if not existed and root.is_dir() and not any(root.iterdir()):
            root.rmdir()  # torchvision makes it before it downloads
        present = sorted(path.name for path in root.glob("*")) if root.is_dir() else []
        found = f"found {', '.join(present[:5])}, incomplete or damaged" if present else "no files"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.root: {name} in {shown(root)}{_below(root)}: {found}, and downloading it "
            f"failed ({reason}); put the archive there by hand or set data.root or DIST_ADV_DATA"
        ) from None
    return Dataset(
        name,
        images.contiguous(),
        torch.as_tensor(np.asarray(labels), dtype=torch.int64),
        classes,
        crop_padding=4,
        flip=name in MIRRORED,
    )


def stored(
    options: DataOptions,
    split: str,
    main_process_first: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Stored:
    """Return a split that lies in files, of which no image but the first was read.

    Raises UserError for files that are missing, or whose first image is damaged.
    """
    framing = options.framing(split)
    if isinstance(options, HfOptions):
        with main_process_first():
            return open_rows(options, split, framing, options.workers)
    if options.name == "packed" and is_store(_root(options)):
        return open_pack(pack_root(options) / split, framing, options.workers)
    folder = data_root(options) / split
    needs = "train/<class>/ and test/<class>/" if options.name == "imagefolder" else "train/, test/"
    if not os.path.isdir(folder):
        raise UserError(
            f"data.root: {shown(folder)} is no folder{_below(folder)}; {options.name} needs "
            f"{needs} below data.root (or DIST_ADV_DATA){_why_not(folder)}"
        )
    if options.name == "packed":
        return open_pack(folder, framing, options.workers)
    listing = list_images(folder)
    return Stored(
        Files(Paths(listing.paths), framing, options.workers),
        torch.tensor(listing.labels),
        listing.classes,
        partial(fingerprint.of_files, listing),
    )


def _below(folder: Path) -> str:
    """Return what a relative path is relative to, as it can be printed."""
    return "" if folder.is_absolute() else f" in {shown(Path.cwd())}"


def _why_not(folder: Path) -> str:
    """Return the system's reason for not showing a folder, where it is another than absence."""
    try:
        os.stat(folder)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f" ({getattr(error, 'strerror', None) or error})"
    return ""


def _of_files(found: Stored, options: DataOptions, as_files: bool) -> Dataset:
    files = found.files
    as_files |= files.framing.scale is not None or files.gigabytes > options.resident_gb
    if not as_files and files.framing.randaugment:
        raise UserError(
            "data.randaugment: is done to pictures as they are read, and this split is kept in "
            "memory; set data.resident_gb=0"
        )
    return Dataset(
        options.name,
        files if as_files else files.all(),
        found.labels,
        found.classes,
        crop_padding=_border(files, options),
        flip=True,
        fingerprint=found.fingerprint(),
    )


def _border(files: Files, options: DataOptions) -> int:
    """Return how wide the borders are that pictures are cropped with; boxes at random need none."""
    usual = 0 if files.framing.scale else files.shape[-1] // 8
    return usual if options.crop_padding is None else options.crop_padding


def _somebodys(options: DataOptions, split: str) -> Dataset:
    """Ask somebody's own data set, `kind(options).load(split)`, for (images, labels, classes).

    images: uint8 (N, C, H, W); labels: integers (N,); classes: their names. An attribute `flip`
    says that mirror images are of the same class.
    """
    name = options.name
    kind = plugins.find(name, GROUP, {})
    try:
        images, labels, classes = kind(options).load(split)
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data.name: {name} cannot be loaded: {plugins.told(error)}") from error
    names = [str(each) for each in classes]
    return of_tensors(name, images, labels, names, flip=getattr(kind, "flip", False))


def of_tensors(
    name: str, images: Tensor, labels: Tensor, classes: list[str] | None = None, flip: bool = False
) -> Dataset:
    """Return a split that somebody has in memory; crops at random get borders of an eighth.

    images: uint8 (N, C, H, W), or float in [0, 1] of which 256 levels are kept; labels: (N,);
    classes: names, as many as the largest label says where there are none.

    Raises UserError for tensors of another kind.
    """
    if images.is_floating_point():
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise UserError(f"data: float images of {name} must be in [0, 1]; scale them")
        images = (images * 255).round().to(torch.uint8)
    problem = ""
    if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
        problem = f"images are {images.dtype} {tuple(images.shape)}, not uint8 (N, C, H, W)"
    elif labels.shape != (len(images),) or labels.is_floating_point():
        problem = f"labels are {labels.dtype} {tuple(labels.shape)}, not integers ({len(images)},)"
    elif labels.min() < 0 or (classes is not None and labels.max() >= len(classes)):
        known = "" if classes is None else f" and there are {len(classes)} classes"
        problem = f"labels go from {labels.min()} to {labels.max()}{known}"
    if problem:
        raise UserError(f"data: {name}: {problem}")
    names = classes or [str(label) for label in range(int(labels.max()) + 1)]
    border = images.shape[-1] // 8
    return Dataset(name, images.contiguous(), labels.long(), names, crop_padding=border, flip=flip)
