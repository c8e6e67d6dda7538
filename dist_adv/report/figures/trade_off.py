"""Natural accuracy against robust accuracy, with training time as size."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from dist_adv.report.figures.album import Album
from dist_adv.report.figures.colours import GREY, Drawn
from dist_adv.report.figures.points import interval_bar, write_names
from dist_adv.report.tables import attack_name
from dist_adv.runs.run import strongest_attack
from dist_adv.text import duration, percentage

_CROWD = 5


def draw(album: Album, drawn: Sequence[Drawn]) -> None:
    """Draw a point a run; where many are robust and some are not, the robust ones again, larger."""
    attack = strongest_attack([each.run for each in drawn])
    shown = [each for each in drawn if {"natural", attack} <= each.run.evaluations.keys()]
    if attack is None or not shown:
        return
    crowd = _crowd(shown, attack)
    figure = Figure(figsize=(10 if crowd else 7.5, 4.6 if crowd else 5), layout="constrained")
    panels = figure.subplots(1, 2 if crowd else 1, squeeze=False)[0]
    longest = max((each.run.seconds or 0.0 for each in shown), default=0.0) or 1.0
    for axes, some in zip(panels, (shown, crowd), strict=False):
        for each in some:
            _plot(axes, each, attack, longest)
        axes.margins(0.18)
        axes.autoscale_view()
        for read, limit in ((axes.get_xlim, axes.set_xlim), (axes.get_ylim, axes.set_ylim)):
            low, high = read()
            limit(max(low, -4), min(high, 104))
        axes.set(xlabel="natural accuracy (%)", ylabel=f"{attack_name(attack)} accuracy (%)")
    if crowd:
        (left, right), (bottom, top) = panels[1].get_xlim(), panels[1].get_ylim()
        frame = Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor=GREY)
        panels[0].add_patch(frame)
    times = [each.run.seconds for each in shown if each.run.seconds]
    if times:
        _explain_sizes(figure, sorted({min(times), max(times)}), longest)
    write_names(figure, panels[0], _names([each for each in shown if each not in crowd], attack))
    if crowd:
        write_names(figure, panels[1], _names(crowd, attack))
    missing = [each.run.label for each in drawn if each not in shown]
    album.add(
        figure,
        "trade-off",
        "Natural accuracy against robustness",
        f"Natural accuracy to the right and accuracy under {attack_name(attack)} upwards, a point "
        f"for each run: {_ends(shown, attack)}.",
        "Each point is a run: the further right, the more natural test images it classifies, and "
        f"the further up, the more of them it still classifies under {attack_name(attack)}, the "
        "strongest attack that the runs share. "
        + ("The right panel is the frame in the left one. " if crowd else "")
        + "Robustness is usually paid for in natural accuracy, "
        "so one run beats another outright only if it lies above it and to its right. The bars are "
        "95 % intervals for the finite number of test images; they do not cover how much a "
        "result varies between training seeds. A larger marker took longer to train."
        + (f" Not evaluated under it: {', '.join(missing)}." if missing else ""),
        "up and to the right is better, small markers are cheaper; a run at the bottom is not "
        "robust, whatever its natural accuracy.",
    )


def _crowd(drawn: Sequence[Drawn], attack: str) -> list[Drawn]:
    """Return the robust ones, where others lie so far below that they press them together."""
    accuracies = [each.run.evaluations[attack].accuracy for each in drawn]
    robust = [each for each, a in zip(drawn, accuracies, strict=True) if a > max(accuracies) / 2]
    return robust if _CROWD <= len(robust) < len(drawn) else []


def _position(drawn: Drawn, attack: str) -> tuple[float, float]:
    natural, robust = (100 * drawn.run.evaluations[name].accuracy for name in ("natural", attack))
    return natural, robust


def _ends(drawn: Sequence[Drawn], attack: str) -> str:
    """Return where the runs lie that the attack leaves most and least of."""
    rated = sorted(drawn, key=lambda each: each.run.evaluations[attack].accuracy)
    if len(rated) == 1:
        return _place(rated[0], attack)
    highest, lowest = (_place(each, attack) for each in (rated[-1], rated[0]))
    return f"the highest of {len(rated)} is {highest}, the lowest {lowest}"


def _place(drawn: Drawn, attack: str) -> str:
    natural, robust = (
        percentage(drawn.run.evaluations[name].accuracy) for name in ("natural", attack)
    )
    return f"{drawn.run.label} ({natural} natural, {robust} under {attack_name(attack)})"


def _names(drawn: Sequence[Drawn], attack: str) -> list[tuple[str, tuple[float, float]]]:
    return [(each.run.label, _position(each, attack)) for each in drawn]


def _plot(axes: Axes, drawn: Drawn, attack: str, longest: float) -> None:
    axes.errorbar(
        *_position(drawn, attack),
        xerr=interval_bar(drawn.run.evaluations["natural"]),
        yerr=interval_bar(drawn.run.evaluations[attack]),
        fmt=drawn.marker,
        color=drawn.colour,
        markersize=_marker_size(drawn.run.seconds or 0, longest),
        markerfacecolor=(drawn.colour, 0.35),
        elinewidth=1.2,
    )


def _marker_size(seconds: float, longest: float) -> float:
    """Return a diameter for which the marker's area grows with the time."""
    return 6 + 11 * float(np.sqrt(seconds / longest))


def _explain_sizes(figure: Figure, times: Sequence[float], longest: float) -> None:
    figure.legend(
        handles=[
            Line2D(
                [],
                [],
                linestyle="none",
                marker="o",
                color="#bbbbbb",
                markersize=_marker_size(seconds, longest),
                label=duration(seconds),
            )
            for seconds in times
        ],
        title="training time",
        loc="outside right center",
        labelspacing=1.2,
    )
