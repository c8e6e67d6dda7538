"""The loader: order and augmentation are functions of (seed, epoch, sample).

All images live on the device as uint8. A batch is one gather: the random crop and the flip are
in the indices, so nothing is done a sample in Python and nothing waits for the host. A set that is
too large for that is read off the disk by threads, a few batches ahead, and goes the same way from
there on: the same batches, bit for bit.

Generated images (`data.extra`) take the last positions of every batch, drawn anew for each epoch
with replacement; the first ones go to real images, in the epoch's order. Samples are numbered on
behind the real ones.

Rank r of W takes positions r, r + W, r + 2 W, ... of every global batch. A position then belongs
to the same rank in full and in short batches (what Free's delta needs), and the ranks' shares
differ by at most one image.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_adv import rng
from dist_adv.data.augment import PLAIN, Augmentation, crop_shift
from dist_adv.data.datasets import Dataset
from dist_adv.data.files import Files
from dist_adv.data.image import TRIES, Framing
from dist_adv.errors import UserError


@dataclass(frozen=True)
class When:
    """Where in the run a batch is, the same on every rank: a schedule is a function of it.

    epoch, batch: counted from 0; batches: of an epoch; progress: the share of the run's optimiser
    steps that is done, in [0, 1); key: a random number of this global batch.
    """

    epoch: int
    batch: int
    batches: int
    key: int
    progress: float = 0.0


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch.

    x: float (n, C, H, W) in [0, 1]; y: int64 (n,), labels, or where images are mixed float
    (n, classes), probabilities; samples: int64 (n,), which images of the data set these are; keys:
    int64 (n,), the random numbers that belong to these samples in this epoch; total: images of the
    global batch; weight: n * ranks / total, by which the mean loss is multiplied so that DDP's
    average over ranks is the global batch's mean.
    """

    x: Tensor
    y: Tensor
    samples: Tensor
    keys: Tensor
    total: int
    weight: float
    when: When

    @property
    def labels(self) -> Tensor:
        """int64 (n,): of a mixed image the likelier class."""
        return self.y.argmax(1) if self.y.dim() == 2 else self.y

    def parts(self, count: int) -> "list[Batch]":
        """Return up to so many parts of about the same size, whose weights add up to this one's."""
        if count == 1:
            return [self]
        sizes = [len(part) for part in self.x.tensor_split(min(count, len(self.x)))]
        columns = (each.split(sizes) for each in (self.x, self.y, self.samples, self.keys))
        return [
            replace(
                self,
                x=x,
                y=y,
                samples=samples,
                keys=keys,
                weight=self.weight * len(x) / len(self.x),
            )
            for x, y, samples, keys in zip(*columns, strict=True)
        ]


def split(
    images: int, batch_size: int, drop_last: bool, world_size: int, mixes: bool = False
) -> tuple[int, int]:
    """(batches of an epoch, the smallest share of a batch that a rank gets).

    Raises UserError where some batch would leave a rank without an image; or, where images of a
    rank are mixed in pairs, with an odd one.
    """
    if batch_size < world_size:
        raise UserError(
            f"train.batch_size: {batch_size} is the global batch and smaller than the "
            f"{world_size} ranks; use at least {world_size}"
        )
    short = images % batch_size
    if 0 < short < world_size and not drop_last:
        raise UserError(
            f"train.batch_size: the last batch has {short} images for {world_size} ranks; "
            f"set data.drop_last=true or choose another batch size"
        )
    batches = images // batch_size + (short > 0 and not drop_last)
    if batches == 0:
        raise UserError(
            f"train.batch_size: {batch_size} is larger than the {images} images and "
            f"data.drop_last is true; use a smaller batch"
        )
    if mixes:
        _check_pairs(batch_size, 0 if drop_last else short, world_size)
    return batches, (short if short and not drop_last else batch_size) // world_size


def _check_pairs(batch_size: int, short: int, world_size: int) -> None:
    """Raise UserError where a rank would have to ask another for an image to mix with."""
    pairs, ranks = 2 * world_size, f"{world_size} rank{'s'[: world_size > 1]}"
    if batch_size % pairs:
        raise UserError(
            f"train.batch_size: {batch_size} images cannot be mixed in pairs (data.mixup, "
            f"data.cutmix) on {ranks}; use a multiple of {pairs}"
        )
    if short % pairs:
        raise UserError(
            f"data.drop_last: the last batch has {short} images, which cannot be mixed in pairs "
            f"(data.mixup, data.cutmix) on {ranks}; set data.drop_last=true"
        )


def count_batches(
    dataset: Dataset, batch_size: int, drop_last: bool, world_size: int, mixes: bool
) -> tuple[int, int]:
    """Return what `split` says of a data set; with generated images the last batch is full, too.

    Raises UserError as it does, and where a batch would have no real images, or no generated ones.
    """
    images = len(dataset)
    if _share_of_extra(dataset, batch_size) and not drop_last:
        images = -(-images // batch_size) * batch_size
    return split(images, batch_size, drop_last, world_size, mixes)


def _share_of_extra(dataset: Dataset, batch_size: int) -> int:
    """Return how many images of a batch are generated. Raises UserError for none, or all."""
    if dataset.extra is None:
        return 0
    share = int(dataset.extra.fraction * batch_size)
    if not 0 < share < batch_size:
        raise UserError(
            f"data.extra.fraction: {dataset.extra.fraction:g} of a batch of {batch_size} is "
            f"{share} images; a batch needs real and generated ones"
        )
    return share


_Source = tuple[Tensor, Tensor | None]
"""Pixels, one a row, and which images of them are wanted; or images that are cut and turned."""


class Loader:
    """Batches of one split for one rank.

    augment: whether to crop with borders and flip; augmentation: what is done to a batch besides.

    Raises UserError for batches that ranks cannot share, and images that cannot be augmented so.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        augment: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        augmentation: Augmentation = PLAIN,
    ) -> None:
        self.generated = _share_of_extra(dataset, batch_size)
        self.batches, _ = count_batches(
            dataset, batch_size, drop_last, world_size, augmentation.mixes
        )
        self.dataset, self.batch_size, self.seed, self.device = dataset, batch_size, seed, device
        self.rank, self.world_size = rank, world_size
        _, self.channels, self.height, self.width = dataset.images.shape
        augmentation.check(self.channels, self.height, self.width)
        self.augmentation = augmentation
        self.padding = dataset.crop_padding if augment and not augmentation.crop_shift else 0
        self.flip = dataset.flip and augment
        self.pixels = None if isinstance(dataset.images, Files) else self._rows(dataset.images)
        labels = [dataset.labels, *([dataset.extra.labels] if dataset.extra else [])]
        self.labels = torch.cat(labels).to(device)
        # (2, H * W): where a crop's pixels are, seen from its first one; and those of its mirror.
        self.padded_width = self.width + 2 * self.padding
        rows = torch.arange(self.height, device=device)[:, None] * self.padded_width
        columns = torch.arange(self.width, device=device)
        windows = torch.stack([rows + columns, rows + columns.flip(0)]).flatten(1)
        area = (self.height + 2 * self.padding) * self.padded_width
        pixels = area * (batch_size if self.pixels is None else len(dataset))
        # Half the bytes of an int64 index: a batch is gathered in two thirds of the time (CPU).
        self.windows = windows.to(torch.int32 if pixels < 2**31 else torch.int64)

    def _order(self, epoch: int) -> Tensor:
        """Return the samples of an epoch, one batch behind the other."""
        real = rng.permutation(rng.stream_key(self.seed, "order", epoch), len(self.dataset))
        extra = self.dataset.extra
        if extra is None:
            return real
        each = self.batch_size - self.generated
        real = real[torch.arange(self.batches * each) % len(real)].view(self.batches, each)
        key = rng.stream_key(self.seed, "extra", epoch)
        keys = rng.sample_keys(key, torch.arange(self.batches * self.generated))
        drawn = len(self.dataset) + rng.integers(keys, len(extra.labels))
        return torch.cat([real, drawn.view(self.batches, self.generated)], dim=1).flatten()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of epoch number `epoch`, from batch number `start` on."""
        order = self._order(epoch)
        spans = [
            (number * self.batch_size, min(len(order), (number + 1) * self.batch_size))
            for number in range(start, self.batches)
        ]
        shares = [slice(first + self.rank, end, self.world_size) for first, end in spans]
        read = self._read_ahead([order[mine] for mine in shares], epoch)
        order = order.to(self.device)
        # Of the whole epoch at once: a batch of 128 would take longer to launch than to compute.
        keys = rng.sample_keys(rng.stream_key(self.seed, "samples", epoch), order)
        crops, flipped = self._augmentation(keys)
        for batch, ((first, end), mine, sources) in enumerate(
            zip(spans, shares, read, strict=True), start
        ):
            samples = order[mine]
            counts = [len(pixels if numbers is None else numbers) for pixels, numbers in sources]
            cut = zip(sources, crops[mine].split(counts), flipped[mine].split(counts), strict=True)
            parts = [self._gather(*source, *where) for source, *where in cut]
            x = torch.cat(parts) if len(parts) > 1 else parts[0]
            x = x.to(torch.get_default_dtype()).div_(255)
            weight = len(x) * self.world_size / (end - first)
            key = rng.stream_key(self.seed, "batch", epoch, batch)
            when = When(epoch, batch, self.batches, key)
            y, classes = self.labels[samples], len(self.dataset.classes)
            x, y = self.augmentation(x, y, keys[mine], flipped[mine], key, classes)
            yield Batch(x, y, samples, keys[mine], end - first, weight, when)

    def _read_ahead(self, shares: list[Tensor], epoch: int) -> Iterable[list[_Source]]:
        """Yield for each batch where its images come from: the real ones, then the generated."""
        real, extra = self.dataset.images, self.dataset.extra
        if extra is None:
            return ([source] for source in self._real(real, shares, epoch))
        ours = [samples[samples < len(self.dataset)] for samples in shares]
        drawn = [samples[len(one) :] for samples, one in zip(shares, ours, strict=True)]
        theirs = [samples - len(self.dataset) for samples in drawn]
        draw = self._draws(extra.files.framing, epoch, len(self.dataset))
        read = extra.files.ahead(theirs, draw, pin=self.device.type == "cuda")
        generated = map(self._whole, read)
        return map(list, zip(self._real(real, ours, epoch), generated, strict=True))

    def _real(self, images: Tensor | Files, shares: list[Tensor], epoch: int) -> Iterable[_Source]:
        if not isinstance(images, Files):
            assert self.pixels is not None
            pixels, lengths = self.pixels, [len(samples) for samples in shares]
            # Of the whole epoch at once: a copy a batch would wait for the step before.
            rows = torch.cat(shares or [torch.empty(0, dtype=torch.int64)]).to(self.device)
            return ((pixels, mine) for mine in rows.split(lengths))
        draw = self._draws(images.framing, epoch)
        read = images.ahead(shares, draw, pin=self.device.type == "cuda")
        if images.framing.scale is None:
            return map(self._whole, read)
        return ((each.to(self.device, non_blocking=True), None) for each in read)

    def _draws(
        self, framing: Framing, epoch: int, first: int = 0
    ) -> Callable[[Tensor], Tensor] | None:
        """Return what gives pictures (n,) the numbers that `image.read` draws by, None for none.

        first: the number, among all samples, of the first of them.
        """
        key, ops = rng.stream_key(self.seed, "samples", epoch), framing.drawn - TRIES - 1

        def draw(pictures: Tensor) -> Tensor:
            keys = rng.sample_keys(key, first + pictures)
            draws = rng.uniform(rng.substream(keys, "box"), (TRIES + 1, 4))
            draws[:, TRIES, 0] = rng.integers(rng.substream(keys, "flip"), 2) if self.flip else 0
            more = rng.uniform(rng.substream(keys, "randaugment"), (ops, 4))
            return torch.cat([draws, more], dim=1)

        return draw if framing.drawn else None

    def _whole(self, images: Tensor) -> _Source:
        """Return images that were read for a batch, of which all are wanted, as pixels."""
        return self._rows(images), torch.arange(len(images), device=self.device)

    def _rows(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to a pixel a row, on the device, with borders to crop into.

        One index_select of such rows gathers a batch, and its result is channels-last. Black
        borders, as torchvision's RandomCrop makes them.
        """
        moved = images.to(self.device, non_blocking=True)
        padded = torch.nn.functional.pad(moved, [self.padding] * 4)
        return padded.permute(0, 2, 3, 1).reshape(-1, self.channels)

    def _augmentation(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """As each sample's key says: where in its image its crop begins, and 1 for a mirror."""
        flipped = crop = torch.zeros_like(keys)
        if self.flip:
            flipped = rng.integers(rng.substream(keys, "flip"), 2)
        if self.padding:
            offsets = 2 * self.padding + 1
            row = rng.integers(rng.substream(keys, "row"), offsets)
            crop = row * self.padded_width + rng.integers(rng.substream(keys, "column"), offsets)
        if most := self.augmentation.crop_shift:
            corners, _ = crop_shift(keys, most, torch.Size((self.height, self.width)), flipped)
            crop = corners[:, 0] * self.width + corners[:, 1]
        return crop, flipped

    def _gather(
        self, pixels: Tensor, numbers: Tensor | None, crops: Tensor, flipped: Tensor
    ) -> Tensor:
        """uint8 (n, C, H, W), channels-last: the crops of the images with these numbers."""
        if numbers is None:
            return pixels
        area = (self.height + 2 * self.padding) * self.padded_width
        corners = (numbers * area + crops).to(self.windows.dtype)
        index = corners[:, None] + self.windows[flipped]
        if self.augmentation.crop_shift:  # what is read outside of an image is black in the end
            index.clamp_(0, len(pixels) - 1)
        shape = (len(numbers), self.height, self.width, self.channels)
        return pixels.index_select(0, index.flatten()).view(shape).permute(0, 3, 1, 2)
