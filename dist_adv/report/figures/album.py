"""The album that keeps figures with the sentences that explain them.

Every axis has a label with its unit, and nothing is told by colour alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

_DPI = 200


@dataclass(frozen=True)
class Illustration:
    """A PNG file with its title and explanation; `width` is in the page's pixels.

    `alt` is for those who do not see it: what is drawn, and what comes out; no two figures of a
    report share it. `look` is what a reader in a hurry should see in it; it goes on after the
    title and a colon.
    """

    path: Path
    width: int
    title: str
    alt: str
    caption: str
    look: str = ""


@dataclass(frozen=True)
class Chapter:
    """Figures under one heading; a folded one is shown when its reader asks for it."""

    title: str
    illustrations: Sequence[Illustration]
    folded: bool = False


def time_unit(longest: float) -> tuple[float, str]:
    """Return the unit for an axis that ends at `longest` seconds, and how many seconds it has."""
    if longest < 3 * 60:
        return 1.0, "s"
    return (60.0, "min") if longest < 3 * 3600 else (3600.0, "h")


class Album:
    """Saves figures under numbered names and keeps what the page needs to show them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._illustrations: list[Illustration] = []

    def add(
        self, figure: Figure, name: str, title: str, alt: str, caption: str, look: str = ""
    ) -> None:
        self._count += 1
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100]
        path = self._folder / f"{self._count:03d}-{slug}.png"
        _save(figure, path)
        width = round(100 * figure.get_figwidth())
        self._illustrations.append(Illustration(path, width, title, alt, caption, look))

    def take(self) -> list[Illustration]:
        """Return the illustrations added since the last call."""
        taken, self._illustrations = self._illustrations, []
        return taken


def _save(figure: Figure, path: Path) -> None:
    """As PNG; one without photographs has few colours, and with a palette a third of the size."""
    drawing = BytesIO()
    figure.savefig(drawing, dpi=_DPI)
    if any(axes.images for axes in figure.axes):
        path.write_bytes(drawing.getvalue())
        return
    with Image.open(drawing) as image:
        palette = image.convert("RGB").quantize(
            256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    palette.save(path, optimize=True)
