"""One image file as 8-bit RGB pixels, the way a viewer shows it, and cut to size."""

import errno
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dist_adv.data.randaugment import RandAugment

# Only these decoders see a file, whatever its name says: Pillow has others that start programs
# (PostScript goes to Ghostscript) or that few people have looked at.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its EXIF orientation."""

_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262

# Of odd metadata and large pictures, which are read all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unreadable(Exception):
    """A file whose pixels cannot be had, or mean nothing here: what is wrong, and the remedy."""

    def __init__(self, what: str, remedy: str = "repair or remove it") -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


@cache
def formats() -> list[str]:
    """Return the names of the formats that are read, as far as this Pillow has them."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


@cache
def extensions() -> frozenset[str]:
    """Return the endings of file names, in lower case, that are taken for images."""
    known = Image.registered_extensions()
    return frozenset(ending for ending, name in known.items() if name in formats())


@dataclass(frozen=True)
class Framing:
    """How pictures of any size become images of one.

    size: of the square that is left, None to leave them as they are. shorter: the side that the
    shorter one is resized to before the centre is cut out of it (None: size). scale: where a box
    is drawn at random, the least and the largest share of the area that it may have. randaugment:
    what is done to them then.
    """

    size: int | None = None
    shorter: int | None = None
    scale: tuple[float, float] | None = None
    randaugment: RandAugment | None = None

    def __call__(self, image: Image.Image, draws: np.ndarray | None) -> np.ndarray:
        """Return uint8 (H, W, C) of a picture's centre, or as `read` draws it."""
        if draws is None:
            return np.asarray(self._centre(image))
        image = self._box(image, draws[: TRIES + 1]) if self.scale else self._centre(image)
        if self.randaugment:
            image = self.randaugment(image, draws[TRIES + 1 :])
        return np.asarray(image)

    @property
    def drawn(self) -> int:
        """How many rows of random numbers a picture takes (`read`), 0 for none."""
        ops = self.randaugment.ops if self.randaugment else 0
        return TRIES + 1 + ops if self.scale or ops else 0

    def _centre(self, image: Image.Image) -> Image.Image:
        if self.size is None:
            return image
        if self.shorter is None or self.shorter == self.size:
            return ImageOps.fit(image, (self.size, self.size), _BILINEAR)
        # Rounded as torchvision's Resize and CenterCrop do.
        least = min(image.size)
        image = image.resize([side * self.shorter // least for side in image.size], _BILINEAR)
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))

    def _box(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        """Return a box of a picture, resized to (size, size), as RandomResizedCrop draws it.

        Mirrored here, for a mirror image of a batch takes ten times as long.
        """
        assert self.size is not None
        assert self.scale is not None
        *tries, (mirrored, *_) = draws.tolist()
        box = _random_box(*image.size, self.scale, tries)
        image = image.crop(box).resize((self.size, self.size), _BILINEAR)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    def enough(self, width: int, height: int) -> tuple[int, int] | None:
        """Return the size that a JPEG of this one may be decoded at, None for its own.

        A decoder halves it while twice the size that is wanted is left, which takes less time; not
        where a box at random may be a small part of it.
        """
        if self.size is None or self.scale is not None:
            return None
        ratio = 2 * (self.shorter or self.size) / min(width, height)
        return (math.ceil(width * ratio), math.ceil(height * ratio)) if ratio < 1 else None


TRIES = 10
_SHAPES = (3 / 4, 4 / 3)  # width to height, at the ends
_BILINEAR = Image.Resampling.BILINEAR


def _random_box(
    width: int, height: int, scale: tuple[float, float], draws: list[list[float]]
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the first try that fits, else of the centre."""
    low, high = map(math.log, _SHAPES)
    for area, shape, column, row in draws:
        target = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(column * (width - w + 1)), int(row * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * _SHAPES[1]))
    h = min(height, round(width / _SHAPES[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def decode(path: str, framing: Framing = Framing()) -> np.ndarray:
    """Return the first picture of the file at this path (`read`). Raises Unreadable."""
    return read(lambda: open(path, "rb"), framing)


def read(
    opened: Callable[[], BinaryIO], framing: Framing, draws: np.ndarray | None = None
) -> np.ndarray:
    """Return the first picture of a file as uint8 (H, W, 3): upright, over white, and framed.

    draws: by which a box is drawn, (TRIES + 1, 4), uniform in [0, 1): area, shape, column and row
    of each try; then 1 where the box is mirrored, and else 0. Behind them a row for each operation
    of RandAugment. None takes the centre as it is.

    Raises Unreadable.
    """
    try:
        with opened() as file:
            image = _picture(file, framing)
    except OSError as error:
        remedy = "raise ulimit -n" if error.errno == errno.EMFILE else "mend or remove it"
        raise Unreadable(f"cannot be read ({error.strerror})", remedy) from None
    return framing(image, draws)


def _picture(file: BinaryIO, framing: Framing) -> Image.Image:
    """Return the first picture of an open file as an upright RGB image. Raises Unreadable."""
    try:
        with Image.open(file, formats=formats()) as picture:
            if enough := framing.enough(*picture.size):
                picture.draft(None, enough)
            picture.load()
            return _upright(_rgb(picture), picture)
    except (Unreadable, MemoryError):
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise Unreadable(f"has more than {limit:,} pixels", "shrink or remove it") from None
    except Exception:  # decoders raise what they like for damaged files: nine kinds seen
        raise Unreadable("not a readable image") from None


def _rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB; transparent ones over white.

    Raises Unreadable where no value is known to be white.
    """
    image = picture
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _from_16_bits(picture)
    elif image.mode == "I":
        raise Unreadable(
            "has 32-bit or signed integers for pixels (Pillow's mode I), whose white is unknown",
            "save it with 8 or 16 bits a channel",
        )
    elif image.mode == "F":
        image = _from_floats(picture)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(page, image).convert("RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Return a grey picture of 16 bits (12 in some TIFF files) with 8, rounded."""
    values = np.asarray(picture).astype(np.uint32)
    white = 2 ** _tiff(picture, _TIFF_BITS, 16) - 1
    levels = (np.minimum(values, white) * 255 + white // 2) // white
    if "transparency" in picture.info:  # a PNG's one grey that is not shown
        levels[values == picture.info["transparency"]] = 255
    return _grey(levels, picture)


def _from_floats(picture: Image.Image) -> Image.Image:
    """Return a grey picture of floats in [0, 1] with 8 bits, rounded.

    Raises Unreadable for other floats.
    """
    values = np.asarray(picture)
    if not ((values >= 0) & (values <= 1)).all():
        raise Unreadable(
            "has floats outside of [0, 1] for pixels (Pillow's mode F), whose white is unknown",
            "save it with 8 or 16 bits a channel, or divided by its white",
        )
    return _grey(np.rint(values * 255), picture)


def _grey(levels: np.ndarray, picture: Image.Image) -> Image.Image:
    """Return 8-bit levels as an image; Pillow leaves TIFF files negative whose white is 0."""
    negative = _tiff(picture, _TIFF_PHOTOMETRIC, 1) == 0
    return Image.fromarray((255 - levels if negative else levels).astype(np.uint8))


def _tiff(picture: Image.Image, tag: int, default: int) -> int:
    """Return a number from the header of a TIFF file; the default elsewhere."""
    value = getattr(picture, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _upright(image: Image.Image, picture: Image.Image) -> Image.Image:
    """Return the image turned as the EXIF data of its file say (Pillow has turned TIFF already).

    ImageOps.exif_transpose would also write the EXIF data anew, and fails where they are odd.
    """
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data: viewers show the picture as it is
        turn = None
    return image if turn is None else image.transpose(turn)
