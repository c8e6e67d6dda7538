"""Folders of made-up photographs, shaped like ImageNet, to try things on in seconds."""

import math
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

_TURNED = 6  # EXIF: the camera was held upright


def make_images(
    folder: str | Path,
    classes: int = 4,
    train: int = 64,
    test: int = 16,
    sizes: tuple[int, int] = (80, 160),
    seed: int = 0,
) -> Path:
    """Write `folder`/train/<class>/ and `folder`/test/<class>/ with JPEG files; return `folder`.

    A class has stripes of a direction and colours of its own under noise, so that a network can
    learn it. The sizes differ, and as in people's folders one of ten files is grey, one in CMYK,
    and one turned by its EXIF data.

    Args:
        train, test: files a class.
        sizes: the least and the largest side in pixels.
        seed: of the noise and the sizes: the same files each time.

    Raises:
        FileExistsError: there is such a folder.
    """
    root = Path(folder)
    root.mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        for label in range(classes):
            place = root / split / f"class_{label:03d}"
            place.mkdir(parents=True)
            for number in range(count):
                draw = np.random.default_rng([seed, split == "test", label, number])
                _save(_picture(draw, label, classes, sizes), number, place / f"{number:05d}.jpg")
    return root


def _picture(
    draw: np.random.Generator, label: int, classes: int, sizes: tuple[int, int]
) -> Image.Image:
    width, height = (int(side) for side in draw.integers(*sizes, 2, endpoint=True))
    angle = math.pi * (label + draw.uniform(-0.2, 0.2)) / classes
    y, x = np.mgrid[:height, :width] / min(sizes)
    wave = np.sin(40 * (x * math.cos(angle) + y * math.sin(angle)) + draw.uniform(0, 6.3))
    hue = 2 * math.pi * label / classes + np.array([0, 2.1, 4.2])
    pixels = 128 + 50 * np.sin(hue) + 50 * wave[..., None] * np.cos(hue)
    pixels = pixels + draw.normal(0, 25, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _save(picture: Image.Image, number: int, path: Path) -> None:
    exif = picture.getexif()
    if number % 10 == 3:
        picture = picture.convert("L")
    elif number % 10 == 5:
        picture = picture.convert("CMYK")
    elif number % 10 == 7:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[ExifTags.Base.Orientation] = _TURNED
    picture.save(path, quality=90, exif=exif)
