"""One image file as 8-bit RGB pixels, the way a viewer shows it."""

import errno
import warnings
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

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


def decode(path: str, size: int | None = None) -> np.ndarray:
    """Return the first picture of a file as uint8 (H, W, 3): upright, over white.

    size: resize the shorter side and crop the centre to size x size.

    Raises Unreadable.
    """
    try:
        with open(path, "rb") as file:
            image = _picture(file)
    except OSError as error:
        remedy = "raise ulimit -n" if error.errno == errno.EMFILE else "mend or remove it"
        raise Unreadable(f"cannot be read ({error.strerror})", remedy) from None
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _picture(file: BinaryIO) -> Image.Image:
    """Return the first picture of an open file as an upright RGB image. Raises Unreadable."""
    try:
        with Image.open(file, formats=formats()) as picture:
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
