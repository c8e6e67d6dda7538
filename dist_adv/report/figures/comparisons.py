"""Figures of all runs together."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from dist_adv.report.figures.album import Album, Drawn
from dist_adv.report.figures.training import curve_attack, curve_split, marker_spacing
from dist_adv.report.runs import strongest_attack
from dist_adv.report.tables import attack_name, duration


def trade_off(album: Album, drawn: Sequence[Drawn]) -> None:
    attack = strongest_attack([each.run for each in drawn])
    shown = [each for each in drawn if {"natural", attack} <= each.run.evaluations.keys()]
    if attack is None or not shown:
        return
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    times = [each.run.seconds for each in shown if each.run.seconds]
    longest = max(times, default=1.0)
    points = []
    for each in shown:
        run = each.run
        pair = [run.evaluations["natural"], run.evaluations[attack]]
        x, y = (100 * evaluation.accuracy for evaluation in pair)
        # Not below 0: at an accuracy of exactly 0 or 1 an interval's end may be an ulp beyond it.
        x_bar, y_bar = (
            [[max(0.0, 100 * (accuracy - low))], [max(0.0, 100 * (high - accuracy))]]
            for accuracy, (low, high) in ((each.accuracy, each.interval) for each in pair)
        )
        axes.errorbar(
            x,
            y,
            xerr=x_bar,
            yerr=y_bar,
            fmt=each.marker,
            color=each.colour,
            markersize=_marker_size(run.seconds or 0, longest),
            markerfacecolor=(each.colour, 0.35),
            elinewidth=1.4,
        )
        points.append((x, y))
    axes.margins(0.18)
    for read, limit in ((axes.get_xlim, axes.set_xlim), (axes.get_ylim, axes.set_ylim)):
        low, high = read()
        limit(max(low, -4), min(high, 104))
    axes.set_xlabel("natural accuracy (%)")
    axes.set_ylabel(f"{attack_name(attack)} accuracy (%)")
    if times:
        axes.legend(
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
                for seconds in sorted({min(times), longest})
            ],
            title="training time",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            labelspacing=1.2,
        )
    _label_points(figure, axes, points, [each.run.label for each in shown])
    missing = [each.run.label for each in drawn if each not in shown]
    album.add(
        figure,
        "trade-off",
        "Natural accuracy against robustness",
        "Each point is a run: the further right, the more natural test images it classifies, and "
        f"the further up, the more of them it still classifies under {attack_name(attack)}, the "
        "strongest attack that the runs share. Robustness is usually paid for in natural accuracy, "
        "so one run beats another outright only if it lies above it and to its right. The bars are "
        "95 % intervals for the finite number of test images; they do not cover how much a "
        "result varies between training seeds. A larger marker took longer to train."
        + (f" Not evaluated under it: {', '.join(missing)}." if missing else ""),
    )


def _marker_size(seconds: float, longest: float) -> float:
    """A diameter for which the marker's area grows with the time."""
    return 7 + 13 * float(np.sqrt(seconds / longest))


def _label_points(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]
) -> None:
    """Write each label beside its point, where it covers neither a marker nor another label."""
    notes = [
        axes.annotate(
            label,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            bbox={"facecolor": (1, 1, 1, 0.75), "edgecolor": "none", "pad": 1},
            in_layout=False,
        )
        for label, point in zip(labels, points, strict=True)
    ]
    figure.draw_without_rendering()  # settles the layout, so that positions in pixels hold
    radius = 10 * figure.dpi / 72
    taken = [
        Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)
        for x, y in axes.transData.transform(points)
    ]
    inside = axes.get_window_extent()
    for note in notes:
        # Diagonals only, near ones first: straight out, a label would lie on an error bar.
        for distance, up, right in product((11, 24, 37), (1, -1), (1, -1)):
            note.xyann = (5 * right, distance * up)
            note.set(ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top")
            box = note.get_window_extent()
            if not any(box.overlaps(other) for other in taken) and all(
                inside.contains(x, y) for x, y in (box.min, box.max)
            ):
                break
        taken.append(note.get_window_extent())


def overlay(album: Album, drawn: Sequence[Drawn], *, over_time: bool) -> None:
    shown = [each for each in drawn if each.run.curve("test_accuracy")]
    if not shown:
        return
    divisor, unit = 1.0, "passes over the data"
    if over_time:
        divisor, unit = _time_unit(max(each.run.epochs[-1]["seconds"] for each in shown))
    attack, sample = curve_attack([each.run for each in shown])
    split = curve_split([each.run for each in shown])
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, name in zip(
        figure.subplots(1, 2), ("test_accuracy", "pgd_accuracy"), ("natural", attack), strict=True
    ):
        for each in shown:
            records = each.run.curve(key)
            axes.plot(
                [record["seconds" if over_time else "epoch"] / divisor for record in records],
                [100 * record[key] for record in records],
                color=each.colour,
                marker=each.marker,
                markevery=marker_spacing(records),
                label=each.run.label,
            )
        axes.set_xlabel(f"training time ({unit})" if over_time else unit)
        axes.set_ylabel(f"{name} {split} accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=not over_time))
        axes.set_xlim(left=0)
    figure.axes[1].set_ylim(bottom=-2)
    figure.legend(
        handles=figure.axes[0].get_lines(), loc="outside upper center", ncols=min(len(shown), 4)
    )
    if over_time:
        caption = (
            "The same curves against the wall time of training alone; the evaluation of the curves "
            "is not counted. This is the comparison that decides what to use under a time budget, "
            "and it holds between runs on the same hardware."
        )
    else:
        caption = (
            f"Accuracy on natural {split} images (left) and on the same images under "
            f"{attack} (right), during training. Passes are not equal work: Free updates the model "
            "several times on each minibatch, and PGD training spends several gradients on each "
            "update. If the right-hand curve drops to nothing while the left one holds or rises, "
            "that is catastrophic overfitting: the model has learned to mislead the weak attack it "
            f"trains on and has no robustness left.{sample}"
        )
    album.add(
        figure,
        "accuracy-over-time" if over_time else "accuracy-over-passes",
        f"Accuracy over {'training time' if over_time else 'passes'}",
        caption,
    )


def _time_unit(longest: float) -> tuple[float, str]:
    """The unit for an axis that ends at `longest` seconds, and how many seconds it has."""
    if longest < 3 * 60:
        return 1.0, "s"
    return (60.0, "min") if longest < 3 * 3600 else (3600.0, "h")
