"""RandAugment (Cubuk et al. 2020) of one picture: torchvision's 14 operations and magnitudes."""

from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from pydantic import Field

from dist_adv.options import Options

_LEVELS = 31
_SHIFT = 150 / 331  # of the side; AutoAugment's pictures had 331 pixels


class RandAugment(Options):
    """ops: how many operations each picture goes through; magnitude: of them, of 0 to 30.

    torchvision's RandAugment: black where a picture is shifted away, nearest pixels. Singh et al.'s
    and ARES' is timm's, whose magnitudes vary and whose list is longer.
    """

    ops: Annotated[int, Field(ge=1, le=14)] = 2
    magnitude: Annotated[int, Field(ge=0, lt=_LEVELS)] = 9

    def __call__(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        """Return an RGB picture after `ops` operations.

        draws: (ops, 2 or more), uniform in [0, 1): which operation; below 1/2 turns its sign.
        """
        for which, side, *_ in draws.tolist():
            table = operations(self.magnitude, *image.size)
            name, level, signed = table[int(which * len(table))]
            image = apply(image, name, -level if signed and side < 0.5 else level)
        return image


@lru_cache(maxsize=64)  # pictures of one size, mostly
def operations(magnitude: int, width: int, height: int) -> list[tuple[str, float, bool]]:
    """Return (name, level, whether its sign is drawn) of each operation.

    Levels are those of torch.linspace, in single precision: one ulp less than a whole number of
    pixels is a pixel less.
    """

    def level(first: float, last: float) -> float:
        return torch.linspace(first, last, _LEVELS)[magnitude].item()

    colour = level(0.0, 0.9)
    return [
        ("Identity", 0.0, False),
        ("ShearX", level(0.0, 0.3), True),
        ("ShearY", level(0.0, 0.3), True),
        ("TranslateX", level(0.0, _SHIFT * width), True),
        ("TranslateY", level(0.0, _SHIFT * height), True),
        ("Rotate", level(0.0, 30.0), True),
        ("Brightness", colour, True),
        ("Color", colour, True),
        ("Contrast", colour, True),
        ("Sharpness", colour, True),
        ("Posterize", 8 - round(magnitude / ((_LEVELS - 1) / 4)), False),
        ("Solarize", level(255.0, 0.0), False),
        ("AutoContrast", 0.0, False),
        ("Equalize", 0.0, False),
    ]


_ENHANCERS = {
    "Brightness": ImageEnhance.Brightness,
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Sharpness": ImageEnhance.Sharpness,
}


def apply(image: Image.Image, name: str, level: float) -> Image.Image:
    """Return a picture after one operation."""
    if name in _ENHANCERS:
        return _ENHANCERS[name](image).enhance(1 + level)
    match name:
        case "ShearX":
            return _moved(image, (1, level, 0, 0, 1, 0))
        case "ShearY":
            return _moved(image, (1, 0, 0, level, 1, 0))
        case "TranslateX":
            return _moved(image, (1, 0, -int(level), 0, 1, 0))
        case "TranslateY":
            return _moved(image, (1, 0, 0, 0, 1, -int(level)))
        case "Rotate":
            return image.rotate(level)
        case "Posterize":
            return ImageOps.posterize(image, int(level))
        case "Solarize":
            return ImageOps.solarize(image, level)  # type: ignore[arg-type]  # compares with it
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
    return image


def _moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Return a picture whose pixel (x, y) is that of (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)
