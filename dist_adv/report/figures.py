"""The report's figures, each with the sentences that explain it.

A run has the same colour and marker wherever it appears, and nothing is told by colour alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from dist_adv.report.runs import Examples, Record, Run, strongest_attack
from dist_adv.report.tables import attack_name, duration, method_name, threat_name

_DPI = 200
_STYLE: Any = {  # matplotlib versions differ in how they type the keys
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
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREY = "#767676"
_RIGHT, _WRONG = "#00704F", "#B84300"
_MAX_EXAMPLES = 8


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
class _Drawn:
    """A run and its looks."""

    run: Run
    colour: str
    marker: str


def draw(runs: Sequence[Run], folder: Path) -> list[Chapter]:
    """Draw every figure for which the runs hold data into `folder`, in place of earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9]-*.png"):
        old.unlink()
    drawn = [
        _Drawn(run, _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        for i, run in enumerate(runs)
    ]
    album = _Album(folder)
    with rc_context(_STYLE):
        _trade_off(album, drawn)
        _overlay(album, drawn, over_time=False)
        _overlay(album, drawn, over_time=True)
        chapters = [Chapter("The runs together", album.take())]
        for each in drawn:
            run = each.run
            _curves(album, each)
            _examples(album, run)
            state = "" if run.finished else ", unfinished"
            title = f"{run.label} ({method_name(run)}){state}"
            chapters.append(Chapter(title, album.take()))
    return chapters


class _Album:
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


def _trade_off(album: _Album, drawn: Sequence[_Drawn]) -> None:
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


def _overlay(album: _Album, drawn: Sequence[_Drawn], *, over_time: bool) -> None:
    shown = [each for each in drawn if each.run.curve("test_accuracy")]
    if not shown:
        return
    divisor, unit = 1.0, "passes over the data"
    if over_time:
        divisor, unit = _time_unit(max(each.run.epochs[-1]["seconds"] for each in shown))
    attack, sample = _curve_attack([each.run for each in shown])
    split = _curve_split([each.run for each in shown])
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
                markevery=_marker_spacing(records),
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


def _curve_attack(runs: Sequence[Run]) -> tuple[str, str]:
    """The attack of the PGD curves as far as the runs agree, and a sentence on their sample."""
    records = [record for run in runs for record in run.curve("pgd_accuracy")]
    attacks = {record["curve_attack"] for record in records}
    counts = {record["curve_n"] for record in records}
    attack = attack_name(attacks.pop()) if len(attacks) == 1 else "PGD"
    if not counts:
        return attack, ""
    n = min(counts)
    margin = 100 * 1.96 * np.sqrt(0.25 / n)
    return attack, (
        f" The curves use {n:,} {_curve_split(runs)} images, so the 95 % interval of a point "
        f"reaches up to {margin:.1f} percentage points to either side."
    )


def _curve_split(runs: Sequence[Run]) -> str:
    """Which images the curves are of: `held-out` ones of the training images, or `test` images."""
    records = [record for run in runs for record in run.curve("pgd_accuracy")]
    return " or ".join(sorted({record.get("curve_split", "test") for record in records})) or "test"


def _marker_spacing(records: Sequence[Record]) -> int:
    """Draw about fifteen markers on a curve, and one on a curve of a single point."""
    return max(1, len(records) // 15)


def _curves(album: _Album, drawn: _Drawn) -> None:
    run = drawn.run
    if not run.epochs:
        return
    attack, sample = _curve_attack([run])
    split = _curve_split([run])
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, accuracy, error = figure.subplots(1, 3)
    for key, label, colour, line, fill in (
        ("train", "training inputs", _GREY, ":", _GREY),
        ("test", f"natural {split} images", drawn.colour, "-", drawn.colour),
        ("pgd", f"{split} images under {attack}", drawn.colour, "--", "white"),
    ):
        records = run.curve(f"{key}_accuracy")
        passes = [record["epoch"] for record in records]
        accuracies = np.array([100 * record[f"{key}_accuracy"] for record in records])
        for axes, values in (
            (loss, [record[f"{key}_loss"] for record in records]),
            (accuracy, accuracies),
            (error, 100 - accuracies),
        ):
            axes.plot(
                passes,
                values,
                color=colour,
                linestyle=line,
                marker=drawn.marker,
                markersize=4,
                markerfacecolor=fill,
                markevery=_marker_spacing(records),
                label=label,
            )
    for axes, name in (
        (loss, "cross-entropy loss"),
        (accuracy, "accuracy (%)"),
        (error, "error (%)"),
    ):
        axes.set_xlabel("passes over the data")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(left=0)
    for axes in (accuracy, error):
        axes.set_ylim(-3, 103)
    _scale_loss(loss)
    figure.legend(handles=accuracy.get_lines(), loc="outside upper center", ncols=3)
    inputs = (
        "unperturbed images"
        if run.config["method"]["name"] == "natural"
        else "the adversarial images of its own training attack"
    )
    album.add(
        figure,
        f"curves-{run.label}",
        "Loss, accuracy and error during training",
        f"The training curve is measured on what this method trains on, {inputs}, while the "
        "weights are still moving. The test curves use the weights at the end of a pass, on "
        f"natural images and under {attack}; the distance between these two is what the attack "
        f"costs. Error is 100 % minus accuracy.{sample}",
    )


def _scale_loss(axes: Axes) -> None:
    """From zero, or logarithmic where a linear axis would press the smaller curves flat."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    values = values[np.isfinite(values)]  # a run that diverged logs NaN
    if not len(values):
        return
    if values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
        axes.set_ylabel("cross-entropy loss (log scale)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.08 * values.max())


def _examples(album: _Album, run: Run) -> None:
    examples = run.examples
    if examples is None:
        return
    count = min(len(examples.label), _MAX_EXAMPLES)
    clean, adversarial = (
        np.moveaxis(images[:count], 1, -1) for images in (examples.clean, examples.adversarial)
    )
    change = adversarial - clean
    peak = float(np.abs(change).max())
    gain = max(1, int(0.5 / peak)) if peak else 1
    figure = Figure(figsize=(1.17 * count + 0.6, 4.8), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    rows = (
        ("clean", clean, examples.clean_prediction),
        (f"perturbation\n(amplified {gain} times)", np.clip(0.5 + gain * change, 0, 1), None),
        ("adversarial", adversarial, examples.adversarial_prediction),
    )
    for row, (name, images, predictions) in zip(grid, rows, strict=True):
        row[0].set_ylabel(name)
        for i, (axes, image) in enumerate(zip(row, images, strict=True)):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set(visible=True, color="#cccccc")
            if predictions is not None:
                _caption(axes, examples, int(examples.label[i]), int(predictions[i]))
    attack = attack_name(examples.attack)
    album.add(
        figure,
        f"examples-{run.label}",
        f"Examples under {attack}",
        f"Test images, the perturbations that {attack} finds within {threat_name(run)}, and their "
        f"sums. Grey means no change; the perturbation is amplified {gain} times to be seen at "
        "all. Under each image stand its true class and, after the arrow, the prediction: "
        "green with a check mark if right, red with a cross if wrong.",
    )


def _caption(axes: Axes, examples: Examples, label: int, prediction: int) -> None:
    right = prediction == label
    axes.set_xlabel(
        f"{_short(examples.classes[label])}\n"
        f"\N{RIGHTWARDS ARROW} {_short(examples.classes[prediction])} "
        + ("\N{CHECK MARK}" if right else "\N{BALLOT X}"),
        color=_RIGHT if right else _WRONG,
        fontsize=8,
    )


def _short(name: str) -> str:
    """A class name that fits below its image."""
    return name if len(name) <= 15 else name[:14] + "\N{HORIZONTAL ELLIPSIS}"
