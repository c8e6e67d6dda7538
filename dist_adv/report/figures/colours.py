"""Colours, markers and the style of all figures: a run looks the same wherever it appears."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_adv.runs.run import Run

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
GREY = "#767676"


@dataclass(frozen=True)
class Drawn:
    """A run and its looks."""

    run: Run
    colour: str
    marker: str


def give_looks(runs: Sequence[Run]) -> list[Drawn]:
    """Return a colour for each of a few runs; of many, one for each method, with markers.

    Methods share a colour from the eighth on, but not its markers.
    """
    if len(runs) <= len(COLOURS):
        return [Drawn(*looks) for looks in zip(runs, COLOURS, MARKERS, strict=False)]
    methods = [run.config["method"]["name"] for run in runs]
    colours = {method: _METHOD_COLOURS[method] for method in methods if method in _METHOD_COLOURS}
    others = itertools.cycle([each for each in COLOURS if each not in colours.values()])
    drawn = []
    seen: Counter[str] = Counter()
    for run, method in zip(runs, methods, strict=True):
        if method not in colours:
            colours[method] = next(others)
        colour = colours[method]
        drawn.append(Drawn(run, colour, MARKERS[seen[colour] % len(MARKERS)]))
        seen[colour] += 1
    return drawn
