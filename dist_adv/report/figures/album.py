"""How figures look, and the album that keeps them with the sentences that explain them.

A run has the same colour and marker wherever it appears, and nothing is told by colour alone.
Every axis has a label with its unit.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from dist_adv.runs.run import Run

_DPI = 200
STYLE: Any = {  # matplotlib versions differ in how they type the keys
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a dollar sign in a run's name is one
}
# Okabe and Ito's palette for all kinds of colour vision, without its yellow (too pale on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_METHOD_COLOURS = {"natural": "#000000", "pgd": "#CC79A7", "free": "#0072B2", "fast": "#D55E00"}
_OTHER_METHOD = "#009E73"
GREY = "#767676"


@dataclass(frozen=True)
class Illustration:
    """A PNG file with its title and explanation; `width` is in the page's pixels.

    `look` is what a reader in a hurry should see in it; it goes on after the title and a colon.
    """

    path: Path
    width: int
    title: str
    caption: str
    look: str = ""


@dataclass(frozen=True)
class Chapter:
    """Figures under one heading; a folded one is shown when its reader asks for it."""

    title: str
    illustrations: Sequence[Illustration]
    folded: bool = False


@dataclass(frozen=True)
class Drawn:
    """A run and its looks."""

    run: Run
    colour: str
    marker: str


def give_looks(runs: Sequence[Run]) -> list[Drawn]:
    """A colour of its own for each of a few runs; of many, one for each method, and own markers."""
    if len(runs) <= len(COLOURS):
        return [Drawn(*looks) for looks in zip(runs, COLOURS, MARKERS, strict=False)]
    drawn = []
    seen: Counter[str] = Counter()
    for run in runs:
        method = run.config["method"]["name"]
        colour = _METHOD_COLOURS.get(method, _OTHER_METHOD)
        drawn.append(Drawn(run, colour, MARKERS[seen[method] % len(MARKERS)]))
        seen[method] += 1
    return drawn


def time_unit(longest: float) -> tuple[float, str]:
    """The unit for an axis that ends at `longest` seconds, and how many seconds it has."""
    if longest < 3 * 60:
        return 1.0, "s"
    return (60.0, "min") if longest < 3 * 3600 else (3600.0, "h")


class Album:
    """Saves figures under numbered names and keeps what the page needs to show them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._illustrations: list[Illustration] = []

    def add(self, figure: Figure, name: str, title: str, caption: str, look: str = "") -> None:
        self._count += 1
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100]
        path = self._folder / f"{self._count:03d}-{slug}.png"
        _save(figure, path)
        width = round(100 * figure.get_figwidth())
        self._illustrations.append(Illustration(path, width, title, caption, look))

    def take(self) -> list[Illustration]:
        """The illustrations added since the last call."""
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
