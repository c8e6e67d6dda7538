"""Catastrophic overfitting: accuracy under one step is kept, accuracy under many is lost."""

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dist_adv.report.figures.album import Album
from dist_adv.report.figures.colours import GREY, Drawn
from dist_adv.report.figures.training import curve_attack, curve_split, marker_spacing
from dist_adv.runs.run import Record, Run, best_of_each_method
from dist_adv.text import percentage

_MOST_PANELS = 8
_COLUMNS = 4
_CURVES: Sequence[
    tuple[str, str, Literal[":", "-", "--"], bool]
] = (  # key, what it is, line, whether its markers are filled
    ("train_accuracy", "training images under the run's own attack", ":", True),
    ("fgsm_accuracy", "{split} images under FGSM", "-", True),
    ("pgd_accuracy", "{split} images under {attack}", "--", False),
)
# PGD leaves less than this share of one of these, and less by more than the gap: a collapse.
_SHARE_OF_FGSM = 1 / 2
_SHARE_OF_TRAINING = 1 / 4
_GAP = 0.2


def draw(album: Album, drawn: Sequence[Drawn]) -> None:
    """Draw a panel for each run that trains on adversarial images, collapsed ones first."""
    runs = {
        each: _collapse(each.run)
        for each in drawn
        if each.run.config["method"]["name"] != "natural" and each.run.curve("pgd_accuracy")
    }
    if not runs:
        return
    best = best_of_each_method([each.run for each in runs]).values()
    shown = sorted(runs, key=lambda each: (runs[each] is None, each.run not in best))
    del shown[_MOST_PANELS:]
    attack, sample = curve_attack([each.run for each in shown])
    split = curve_split([each.run for each in shown])
    columns = min(len(shown), _COLUMNS)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(10, 2.4 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes in panels[len(shown) :]:
        axes.remove()
    for axes, each in zip(panels, shown, strict=False):
        _panel(axes, each, runs[each])
    panels[0].set_ylim(bottom=-3)  # of all: they share the axis
    for axes in panels[: len(shown) : columns]:
        axes.set_ylabel("accuracy (%)")
    figure.legend(
        handles=[
            Line2D(
                [],
                [],
                color=GREY if line == ":" else "#000000",
                linestyle=line,
                marker="o",
                markerfacecolor="none" if not filled else None,
                label=name.format(split=split, attack=attack),
            )
            for _, name, line, filled in _CURVES
        ],
        loc="outside upper center",
        ncols=3,
    )
    look = _look([each for each in shown if runs[each] is not None], attack)
    left_out = [each.run.label for each in runs if each not in shown]
    album.add(
        figure,
        "catastrophic-overfitting",
        "Catastrophic overfitting",
        f"Line charts by epoch, one for each of {', '.join(each.run.label for each in shown)}: "
        f"accuracy on training images, under FGSM and under {attack}; {look}",
        "Training on a single attack step can go wrong from one epoch to the next: the model "
        "learns to mislead that step, so accuracy on its own training images rises and FGSM, one "
        f"step too, still leaves some, while {attack} leaves nothing. The line and the shade mark "
        "from where the guard tripped (PGD-5 accuracy on training images fell and FGSM accuracy "
        f"did not fall with it), or {attack} left less than half of the accuracy under FGSM, or "
        "less than a quarter of that on the training images (or of the natural accuracy, where "
        "that is lower), and by more than 20 points; a run that recovered has no mark."
        + sample
        + (f" Not shown: {', '.join(left_out)}." if left_out else ""),
        look,
    )


def _collapse(run: Run) -> float | None:
    """Return the first epoch after which the run had collapsed, if it did not recover."""
    begun = None
    for record in run.epochs:
        if _collapsed(record):
            begun = record["epoch"] if begun is None else begun
        elif "pgd_accuracy" in record:
            begun = None
    return begun


def _collapsed(record: Record) -> bool:
    if "pgd_accuracy" not in record:
        return bool(record.get("guard_tripped"))
    pgd, fgsm = record["pgd_accuracy"], record.get("fgsm_accuracy", 0.0)
    # Of images learnt by heart the natural accuracy on test images has its share already.
    learnt = min(record.get(key, 1.0) for key in ("train_accuracy", "test_accuracy"))
    return bool(record.get("guard_tripped")) or any(
        pgd < share * kept and kept - pgd > _GAP
        for kept, share in ((fgsm, _SHARE_OF_FGSM), (learnt, _SHARE_OF_TRAINING))
    )


def _panel(axes: Axes, drawn: Drawn, collapse: float | None) -> None:
    for key, _, line, filled in _CURVES:
        records = drawn.run.curve(key)
        axes.plot(
            [record["epoch"] for record in records],
            [100 * record[key] for record in records],
            color=GREY if line == ":" else drawn.colour,
            linestyle=line,
            marker=drawn.marker,
            markerfacecolor=None if filled else "white",
            markevery=marker_spacing(records),
        )
    last = drawn.run.epochs[-1]["epoch"]
    if collapse is not None:
        axes.axvspan(collapse, last, color="#F3D9C9", zorder=0)
        axes.axvline(collapse, color="#000000", linewidth=1, zorder=1)
    fate = f"\ncollapsed in epoch {collapse:g}" if collapse is not None else ""
    axes.set_title(drawn.run.label + fate)
    axes.set_xlabel("epochs")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlim(0, 1.04 * last)


def _look(fallen: Sequence[Drawn], attack: str) -> str:
    if not fallen:
        return "none of these runs collapsed."
    ends = []
    for each in fallen:
        last = each.run.curve("pgd_accuracy")[-1]
        ends.append(
            f"{each.run.label} (from epoch {_collapse(each.run):g} on; at the end "
            f"{percentage(last['train_accuracy'])} of its training images and "
            f"{percentage(last['pgd_accuracy'])} under {attack})"
        )
    return f"collapsed: {'; '.join(ends)}."
