"""Points with names and intervals: what figures that compare runs are made of."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from dist_adv.report.figures.colours import GREY
from dist_adv.runs.reading import Evaluation


def interval_bar(evaluation: Evaluation) -> list[list[float]]:
    """Return an accuracy's interval as matplotlib's errors below and above, in percent.

    Not below 0: at an accuracy of exactly 0 or 1 an interval's end may be an ulp beyond it.
    """
    low, high = evaluation.interval
    return [
        [max(0.0, 100 * (evaluation.accuracy - low))],
        [max(0.0, 100 * (high - evaluation.accuracy))],
    ]


def write_names(
    figure: Figure, axes: Axes, named: Sequence[tuple[str, tuple[float, float]]]
) -> None:
    """Write a name beside each point, in data units, where it covers neither a marker nor a name.

    Call it last: it settles the layout.
    """
    named = sorted(named, key=lambda each: -each[1][1])
    points = [point for _, point in named]
    notes = [
        axes.annotate(
            name,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            bbox={"facecolor": (1, 1, 1, 0.75), "edgecolor": "none", "pad": 1},
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 3},
            in_layout=False,
        )
        for name, point in named
    ]
    figure.draw_without_rendering()  # settles the layout, so that positions in pixels hold
    radius = 7 * figure.dpi / 72
    taken = [
        Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)
        for line in axes.get_lines()
        for x, y in axes.transData.transform(line.get_xydata())
    ]
    inside = axes.get_window_extent()
    places = axes.transData.transform(points)
    middle = np.median(places, axis=0)
    for note, point in zip(notes, places, strict=True):
        # Diagonals only, near ones first: straight out, a label would lie on an error bar. Away
        # from the others first.
        right_first, up_first = np.where(np.less(point, middle), -1, 1)
        for distance, across, up, right in product(
            (11, 24, 37, 50, 63, 76),
            (5, 30, 55),
            (up_first, -up_first),
            (right_first, -right_first),
        ):
            note.xyann = (across * right, distance * up)
            note.set(ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top")
            box = Text.get_window_extent(note)
            if not any(box.overlaps(other) for other in taken) and all(
                inside.contains(x, y) for x, y in (box.min, box.max)
            ):
                break
        taken.append(Text.get_window_extent(note))
