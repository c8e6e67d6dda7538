"""The course of one run's training, and how curves are drawn."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from dist_adv.report.figures.album import Album
from dist_adv.report.figures.colours import GREY, Drawn
from dist_adv.report.tables import attack_name
from dist_adv.runs.run import Record, Run
from dist_adv.text import percentage


def curve_attack(runs: Sequence[Run]) -> tuple[str, str]:
    """Return the attack of the PGD curves as far as runs agree, and a sentence on their sample."""
    records = [record for run in runs for record in run.curve("pgd_accuracy")]
    attacks = {record.get("curve_attack", "pgd") for record in records}
    counts = {record["curve_n"] for record in records if "curve_n" in record}
    attack = attack_name(attacks.pop()) if len(attacks) == 1 else "PGD"
    if not counts:
        return attack, ""
    n = min(counts)
    margin = 100 * 1.96 * np.sqrt(0.25 / n)
    return attack, (
        f" The curves use {n:,} {curve_split(runs)} images, so the 95 % interval of a point "
        f"reaches up to {margin:.1f} percentage points to either side."
    )


def curve_split(runs: Sequence[Run]) -> str:
    """Which images the curves are of: `held-out` ones of the training images, or `test` images."""
    records = [record for run in runs for record in run.curve("pgd_accuracy")]
    return " or ".join(sorted({record.get("curve_split", "test") for record in records})) or "test"


def marker_spacing(records: Sequence[Record]) -> int:
    """Draw about fifteen markers on a curve, and one on a curve of a single point."""
    return max(1, len(records) // 15)


def curves(album: Album, drawn: Drawn, who: str) -> None:
    """Draw loss, accuracy and error of a run, which is called `who` where it is not drawn."""
    run = drawn.run
    if not run.epochs:
        return
    attack, sample = curve_attack([run])
    split = curve_split([run])
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, accuracy, error = figure.subplots(1, 3)
    for key, label, colour, line, fill in (
        ("train", "training inputs", GREY, ":", GREY),
        ("test", f"natural {split} images", drawn.colour, "-", drawn.colour),
        ("pgd", f"{split} images under {attack}", drawn.colour, "--", "white"),
    ):
        records = run.curve(f"{key}_accuracy")
        epochs = [record["epoch"] for record in records]
        accuracies = np.array([100 * record[f"{key}_accuracy"] for record in records])
        for axes, values in (
            (loss, [record.get(f"{key}_loss") for record in records]),
            (accuracy, accuracies),
            (error, 100 - accuracies),
        ):
            axes.plot(
                epochs,
                values,
                color=colour,
                linestyle=line,
                marker=drawn.marker,
                markersize=4,
                markerfacecolor=fill,
                markevery=marker_spacing(records),
                label=label,
            )
    for axes, name in (
        (loss, "cross-entropy loss"),
        (accuracy, "accuracy (%)"),
        (error, "error (%)"),
    ):
        axes.set_xlabel("epochs")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
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
        f"Three line charts of {who} by epoch: loss, accuracy and error on training images, on "
        f"natural {split} images and under {attack}{_ends(run, attack)}.",
        f"The training curve is measured on what this method trains on, {inputs}, while the "
        "weights are still moving. The test curves use the weights at the end of an epoch, on "
        f"natural images and under {attack}; the distance between these two is what the attack "
        f"costs. Error is 100 % minus accuracy.{sample}",
    )


def _ends(run: Run, attack: str) -> str:
    ends = [
        f"{percentage(curve[-1][key])} {what}"
        for key, what in (("test_accuracy", "natural"), ("pgd_accuracy", f"under {attack}"))
        if (curve := run.curve(key))
    ]
    return f"; the accuracy ends at {' and '.join(ends)}" if ends else ""


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
