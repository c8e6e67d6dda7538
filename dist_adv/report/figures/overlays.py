"""Natural and robust accuracy of all runs by epoch and by time."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dist_adv.report.figures.album import Album, time_unit
from dist_adv.report.figures.colours import COLOURS, Drawn
from dist_adv.report.figures.training import curve_attack, curve_split, marker_spacing
from dist_adv.runs.run import best_of_each_method
from dist_adv.text import percentage

_MOST_CURVES = len(COLOURS)


def draw(album: Album, drawn: Sequence[Drawn]) -> None:
    """Draw the curves over training time, then over epochs; of many runs the best stand out."""
    curved = [each for each in drawn if each.run.curve("test_accuracy")]
    if not curved:
        return
    shown = _readable(curved)
    runs = [each.run for each in curved]
    attack, sample = curve_attack(runs)
    split = curve_split(runs)
    selected = (
        " Thick: the most robust run of each method; thin: the others."
        if len(shown) < len(curved)
        else ""
    )
    charts = (
        f"Two line charts, natural accuracy and accuracy under {attack}, of {len(curved)} "
        f"{'runs' if len(curved) > 1 else 'run'} against"
    )
    divisor, unit = time_unit(max(run.epochs[-1]["seconds"] for run in runs))
    album.add(
        _figure(curved, shown, "seconds", divisor, f"training time ({unit})"),
        "accuracy-over-time",
        "Accuracy over training time",
        f"{charts} training time. {_ends(curved, attack)}",
        f"Accuracy on natural {split} images (left) and on the same images under {attack} (right), "
        "against the wall time of training alone; the evaluation of the curves is not counted. "
        "This is the comparison that decides what to use under a time budget, and it holds between "
        f"runs on the same hardware.{sample}{selected}",
        "which curve on the right is highest at the time that you have: this time buys that "
        f"accuracy under {attack}.",
    )
    album.add(
        _figure(curved, shown, "epoch", 1, "epochs"),
        "accuracy-over-epochs",
        "Accuracy over epochs",
        f"{charts} epochs. {_ends(curved, attack)}",
        "The same curves by epochs. Epochs are not equal work: Free updates the "
        "model several times on each minibatch, and PGD training spends several gradients on each "
        "update. If the right-hand curve drops to nothing while the left one holds or rises, that "
        "is catastrophic overfitting: the model has learned to mislead the weak attack it trains "
        f"on and has no robustness left.{selected}",
    )


def _ends(drawn: Sequence[Drawn], attack: str) -> str:
    """Return between which runs the curves under attack end."""
    ends = sorted(
        (curve[-1]["pgd_accuracy"], each.run.label)
        for each in drawn
        if (curve := each.run.curve("pgd_accuracy"))
    )
    if not ends:
        return "No accuracy under attack was recorded."
    (low, lowest), (high, highest) = ends[0], ends[-1]
    said = f"Under {attack} {highest} ends at {percentage(high)}"
    return said + (f", the highest, and {lowest} at {percentage(low)}." if len(ends) > 1 else ".")


def _figure(
    drawn: Sequence[Drawn], shown: Sequence[Drawn], key: str, divisor: float, label: str
) -> Figure:
    runs = [each.run for each in drawn]
    figure = Figure(figsize=(10, 4), layout="constrained")
    natural, robust = figure.subplots(1, 2)
    for axes, accuracy, name in (
        (natural, "test_accuracy", "natural"),
        (robust, "pgd_accuracy", curve_attack(runs)[0]),
    ):
        for each in drawn:
            records = each.run.curve(accuracy)
            (line,) = axes.plot(
                [record[key] / divisor for record in records],
                [100 * record[accuracy] for record in records],
                color=each.colour,
            )
            if each in shown:
                spacing = marker_spacing(records)
                line.set(marker=each.marker, markevery=spacing, label=each.run.label)
            else:
                line.set(linewidth=0.8, alpha=0.35, zorder=1)
        axes.set(xlabel=label, ylabel=f"{name} {curve_split(runs)} accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=key == "epoch"))
        axes.set_xlim(left=0)
    robust.set_ylim(bottom=-2)
    figure.legend(
        *natural.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=min(len(shown), 4),
    )
    return figure


def _readable(drawn: Sequence[Drawn]) -> list[Drawn]:
    """All of a few runs; of many, the most robust of each method."""
    if len(drawn) <= _MOST_CURVES:
        return list(drawn)
    best = best_of_each_method([each.run for each in drawn]).values()
    return [each for each in drawn if each.run in best]
