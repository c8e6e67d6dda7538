"""The device-resident loader: order and augmentation are functions of (seed, epoch, sample).

All images live on the device as uint8. A batch is one gather: the random crop and the flip are
in the indices, so nothing is done a sample in Python and nothing waits for the host.

Rank r of W takes positions r, r + W, r + 2 W, ... of every global batch. A position then belongs
to the same rank in full and in short batches (what Free's delta needs), and the ranks' shares
differ by at most one image.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_adv import rng
from dist_adv.data.datasets import Dataset
from dist_adv.errors import UserError


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch.

    x: float (n, C, H, W) in [0, 1]; y: int64 (n,); keys: int64 (n,), the random numbers that
    belong to these samples in this epoch; weight: n * ranks / size of the global batch, by which
    the mean loss is multiplied so that DDP's average over ranks is the global batch's mean.
    """

    x: Tensor
    y: Tensor
    keys: Tensor
    weight: float


class Loader:
    """Batches of one split for one rank.

    Raises UserError where some batch would leave a rank without an image.
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
    ) -> None:
        if batch_size < world_size:
            raise UserError(
                f"train.batch_size: {batch_size} is the global batch and smaller than the "
                f"{world_size} ranks; use at least {world_size}"
            )
        short = len(dataset) % batch_size
        if 0 < short < world_size and not drop_last:
            raise UserError(
                f"train.batch_size: the last batch has {short} images for {world_size} ranks; "
                f"set data.drop_last=true or choose another batch size"
            )
        self.batches = len(dataset) // batch_size + (short > 0 and not drop_last)
        if self.batches == 0:
            raise UserError(
                f"train.batch_size: {batch_size} is larger than the {len(dataset)} images and "
                f"data.drop_last is true; use a smaller batch"
            )
        smallest = short if short and not drop_last else batch_size
        self.smallest_share = smallest // world_size
        self.dataset, self.batch_size, self.seed, self.device = dataset, batch_size, seed, device
        self.rank, self.world_size = rank, world_size
        _, self.channels, self.height, self.width = dataset.images.shape
        self.padding = dataset.crop_padding if augment else 0
        self.flip = dataset.flip and augment
        # (N, H + 2p, W + 2p, C): a pixel is a row, so that one index_select gathers a batch
        # and its result is channels-last. Black borders, as torchvision's RandomCrop makes them.
        padded = torch.nn.functional.pad(dataset.images, [self.padding] * 4)
        self.pixels = padded.permute(0, 2, 3, 1).to(device).reshape(-1, self.channels)
        self.labels = dataset.labels.to(device)
        # (2, H * W): where a crop's pixels are, seen from its first one; and those of its mirror.
        self.padded_width = self.width + 2 * self.padding
        rows = torch.arange(self.height, device=device)[:, None] * self.padded_width
        columns = torch.arange(self.width, device=device)
        windows = torch.stack([rows + columns, rows + columns.flip(0)]).flatten(1)
        # Half the bytes of an int64 index: a batch is gathered in two thirds of the time (CPU).
        self.windows = windows.to(torch.int32 if len(self.pixels) < 2**31 else torch.int64)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of pass number `epoch`, from batch number `start` on."""
        order = rng.permutation(rng.stream_key(self.seed, "order", epoch), len(self.dataset))
        order = order.to(self.device)
        # Of the whole pass at once: a batch of 128 would take longer to launch than to compute.
        keys = rng.sample_keys(rng.stream_key(self.seed, "samples", epoch), order)
        corners, flipped = self._augmentation(order, keys)
        for number in range(start, self.batches):
            first, end = number * self.batch_size, (number + 1) * self.batch_size
            mine = slice(first + self.rank, end, self.world_size)
            x = self._gather(corners[mine], flipped[mine])
            x = x.to(torch.get_default_dtype()).div_(255)
            weight = len(x) * self.world_size / len(order[first:end])
            yield Batch(x, self.labels[order[mine]], keys[mine], weight)

    def _augmentation(self, samples: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """As each sample's key says: the first pixel of its crop, and 1 where it is flipped."""
        flipped = torch.zeros_like(samples)
        if self.flip:
            flipped = rng.integers(rng.substream(keys, "flip"), 2)
        row = column = torch.zeros_like(samples)
        if self.padding:
            offsets = 2 * self.padding + 1
            row = rng.integers(rng.substream(keys, "row"), offsets)
            column = rng.integers(rng.substream(keys, "column"), offsets)
        padded_height = self.height + 2 * self.padding
        corners = (samples * padded_height + row) * self.padded_width + column
        return corners.to(self.windows.dtype), flipped

    def _gather(self, corners: Tensor, flipped: Tensor) -> Tensor:
        """uint8 (n, C, H, W), channels-last, of crops with these first pixels."""
        index = corners[:, None] + self.windows[flipped]
        pixels = self.pixels.index_select(0, index.flatten())
        shape = (len(corners), self.height, self.width, self.channels)
        return pixels.view(shape).permute(0, 3, 1, 2)
