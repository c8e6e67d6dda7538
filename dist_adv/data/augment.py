"""Augmentation of a whole batch on the device: CropShift, jitter, erasing, mixup and CutMix.

All of it is drawn by the images' own keys, mixing by the batch's. Products, roots and sums that are
exact in any order give a picture the same bits in a batch of any size, on CPU and GPU, as far as it
had the same before: a GPU divides bytes by 255 with another last bit.
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_adv import rng
from dist_adv.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """What is done to a batch besides crops with borders and flips; 0: not.

    crop_shift: the most pixels that CropShift cuts off. jitter: how far colours go from 1. erase:
    the share of images of which a rectangle is erased. mixup, cutmix: alpha.
    """

    crop_shift: int = 0
    jitter: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether labels become probabilities."""
        return bool(self.mixup or self.cutmix)

    def check(self, channels: int, height: int, width: int) -> None:
        """Raise UserError for images that it cannot be done to."""
        if self.crop_shift >= min(height, width):
            raise UserError(
                f"data.crop_shift: {self.crop_shift} pixels may be all of an image of "
                f"{width}x{height}; use less"
            )
        if self.jitter and channels not in (1, 3):
            raise UserError(
                f"data.jitter: is of images with 1 or 3 channels, and these have {channels}; use 0"
            )

    def __call__(
        self, x: Tensor, labels: Tensor, keys: Tensor, mirrored: Tensor, key: int, classes: int
    ) -> tuple[Tensor, Tensor]:
        """Augment this rank's share of a batch, x (n, C, H, W) in [0, 1], in place.

        labels, keys: int64 (n,); mirrored: int64 (n,), 1 where an image is; key: the batch's.

        Returns the images, and their labels: int64 (n,), or (n, classes) where they are mixed.
        """
        size = x.shape[-2:]
        if self.crop_shift:
            _, kept = crop_shift(keys, self.crop_shift, size, mirrored)
            x.masked_fill_(~_inside(kept, size), 0)
        if self.jitter:
            jitter(x, keys, self.jitter)
        if self.erase:
            x.masked_fill_(_inside(erased(keys, self.erase, size), size), 0)
        if not self.mixes:
            return x, labels
        return mix(x, F.one_hot(labels, classes).to(x), *self._mixture(key, size))

    def _mixture(self, key: int, size: torch.Size) -> tuple[float, "Box | None"]:
        """Return the share that images keep, and for CutMix the box that they do not."""
        dice = random.Random(rng.stream_key("mix", key))
        cut = dice.random() < 0.5 if self.mixup and self.cutmix else bool(self.cutmix)
        alpha = self.cutmix if cut else self.mixup
        share = dice.betavariate(alpha, alpha)
        return cut_box(share, dice, size) if cut else (share, None)


PLAIN = Augmentation()

Box = tuple[int, int, int, int]
"""top, bottom, left, right; the second and fourth are behind the last row and column."""


def _inside(boxes: Tensor, size: torch.Size) -> Tensor:
    """Return the pixels of boxes, bool (n, 1, H, W). boxes: (n, 4), top, left, height, width."""
    top, left, height, width = boxes.T[..., None]
    rows, columns = (torch.arange(side, device=boxes.device) for side in size)
    in_rows = (rows >= top) & (rows < top + height)
    in_columns = (columns >= left) & (columns < left + width)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


# --- CropShift ------------------------------------------------------------------------------------


def crop_shift(
    keys: Tensor, most: int, size: torch.Size, mirrored: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw CropShift (Li and Spratling 2023): cut rows and columns off, put the rest anywhere.

    0 to `most` pixels are cut off, shared by rows and columns at random. most: counted in, where
    the published code's upper end is not.

    Returns:
        int64 (n, 2), row and column of the image that come to lie at (0, 0), which may be outside;
        int64 (n, 4), the box that is left of it, once it is mirrored: top, left, height, width.
    """
    draws = rng.uniform(rng.substream(keys, "crop shift"), (6,)).double()
    strength = (draws[:, 0] * (most + 1)).long()
    columns = (draws[:, 1] * (strength + 1)).long()
    lost = torch.stack([strength - columns, columns], dim=1)
    begin, place = ((draws[:, at : at + 2] * (lost + 1)).long() for at in (2, 4))
    corners = begin - place
    left = torch.where(mirrored == 1, columns - place[:, 1], place[:, 1])
    height, width = size
    return corners, torch.stack([place[:, 0], left, height - lost[:, 0], width - columns], dim=1)


# --- jitter ---------------------------------------------------------------------------------------


def jitter(x: Tensor, keys: Tensor, strength: float) -> None:
    """Change brightness, contrast and saturation, in this order, each by a factor in 1 +- strength.

    As torchvision's ColorJitter computes them, which draws the order, too. In place; grey images
    have no saturation.
    """
    draws = rng.uniform(rng.substream(keys, "jitter"), (3,)).to(x)
    brightness, contrast, saturation = (1 - strength + 2 * strength * draws).T[
        ..., None, None, None
    ]
    x.mul_(brightness).clamp_(0, 1)
    _blend(x, _mean(_grey(x)), contrast)
    if x.shape[1] == 3:
        _blend(x, _grey(x), saturation)


def _blend(x: Tensor, other: Tensor, ratio: Tensor) -> None:
    x.mul_(ratio).add_((1 - ratio) * other).clamp_(0, 1)


def _grey(x: Tensor) -> Tensor:
    """Return (n, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _mean(grey: Tensor) -> Tensor:
    """Return the mean of each image, (n, 1, 1, 1), to 2**-20.

    Integers below 2**20 add up exactly in double precision, in whatever order a device takes them
    for a batch of whatever size; single precision would give ranks other bits.
    """
    levels = (grey * 2.0**20).round_().sum((1, 2, 3), keepdim=True, dtype=torch.float64)
    return (levels / (2.0**20 * grey[0].numel())).to(grey.dtype)


# --- erasing --------------------------------------------------------------------------------------

_AREA = (0.02, 0.33)
_TRIES = 10
# exp is another bit on another device, and may be in another place of a vector: it is looked up.
_LOG_ASPECT = (math.log(0.3), math.log(3.3))
_ASPECTS = torch.linspace(*_LOG_ASPECT, 1024, dtype=torch.float64).exp()


def erased(keys: Tensor, share: float, size: torch.Size) -> Tensor:
    """Draw the boxes of random erasing (Zhong et al. 2020), in `share` of the images.

    2 to 33 % of the area, height to width from 0.3 to 3.3; the first of ten tries that fits.

    Returns int64 (n, 4), top, left, height, width: of no area where nothing is erased.
    """
    height, width = size
    draws = rng.uniform(rng.substream(keys, "erase"), (1 + 4 * _TRIES,)).double()
    area, aspect, row, column = draws[:, 1:].view(-1, _TRIES, 4).unbind(2)
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * (height * width)
    aspect = _ASPECTS.to(keys.device, non_blocking=True)[(aspect * len(_ASPECTS)).long()]
    h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (h < height) & (w < width)
    top, left = (row * (height - h + 1)).long(), (column * (width - w + 1)).long()
    first = fits.int().argmax(1)
    boxes = torch.stack([top, left, h, w], dim=2)[
        torch.arange(len(keys), device=keys.device), first
    ]
    return boxes * ((draws[:, 0] < share) & fits.any(1))[:, None]


# --- mixup and CutMix -----------------------------------------------------------------------------


def cut_box(share: float, dice: random.Random, size: torch.Size) -> tuple[float, Box]:
    """Draw a box of 1 - share of an image's area, and return the share that is left outside of it.

    As timm draws it: its centre is anywhere, so that borders cut it, and the share is corrected.
    """
    ends: list[int] = []
    for side in size:
        cut, centre = int(side * math.sqrt(1 - share)), dice.randrange(side)
        ends += [max(0, centre - cut // 2), min(side, centre + (cut + 1) // 2)]
    top, bottom, left, right = ends
    return 1 - (bottom - top) * (right - left) / math.prod(size), (top, bottom, left, right)


def mix(x: Tensor, y: Tensor, share: float, box: Box | None) -> tuple[Tensor, Tensor]:
    """Mix images (n, C, H, W) and labels (n, classes) in place, by share : 1 - share.

    box: the part of the images that is taken from the others whole (CutMix); None blends (mixup).

    Image p of a global batch of B goes with (p + B/2) mod B. Rank r of W holds r, r + W, ...: where
    W divides B/2, image k of its n goes with (k + n/2) mod n, and no rank needs another's images.
    """
    if box is None:
        _blend_halves(x, share)
    else:
        top, bottom, left, right = box
        part = x[:, :, top:bottom, left:right]
        part.copy_(_swapped(part))
    _blend_halves(y, share)
    return x, y


def _blend_halves(rows: Tensor, share: float) -> None:
    others = _swapped(rows).mul_(1 - share)
    rows.mul_(share).add_(others)


def _swapped(rows: Tensor) -> Tensor:
    """Return a copy with its halves swapped; `roll` would change the order of its memory."""
    half = len(rows) // 2
    return torch.cat([rows[half:], rows[:half]])
