"""How figures look, and the album that keeps them with the sentences that explain them.

A run has the same colour and marker wherever it appears, and nothing is told by colour alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dist_adv.report.runs import Run

_DPI = 200
STYLE: Any = {  # matplotlib versions differ in how they type the keys
    "font.family": "DejaVu Sans",
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
GREY = "#767676"


@dataclass(frozen=True)
class Illustration:
    """A PNG file with its title and explanation; `width` is in the page's pixels."""

    path: Path
    width: int
    title: str
    caption: str


@dataclass(frozen=True)
class Chapter:
    """Figures under one heading."""

    title: str
    illustrations: Sequence[Illustration]


@dataclass(frozen=True)
class Drawn:
    """A run and its looks."""

    run: Run
    colour: str
    marker: str


class Album:
    """Saves figures under numbered names and keeps what the page needs to show them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._illustrations: list[Illustration] = []

    def add(self, figure: Figure, name: str, title: str, caption: str) -> None:
        self._count += 1
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        path = self._folder / f"{self._count:03d}-{slug}.png"
        figure.savefig(path, dpi=_DPI)
        width = round(100 * figure.get_figwidth())
        self._illustrations.append(Illustration(path, width, title, caption))

    def take(self) -> list[Illustration]:
        """The illustrations added since the last call."""
        taken, self._illustrations = self._illustrations, []
        return taken
