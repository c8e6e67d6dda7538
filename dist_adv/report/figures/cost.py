"""Robust accuracy against what training cost, in passes through the network and not in seconds."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from dist_adv.report.figures.album import Album
from dist_adv.report.figures.colours import GREY, Drawn
from dist_adv.report.figures.points import interval_bar, write_names
from dist_adv.report.tables import attack_name
from dist_adv.runs.run import Run, strongest_attack

_WIDE = 10.0  # a ratio of costs from which on the axis is logarithmic


def draw(album: Album, drawn: Sequence[Drawn]) -> None:
    """Draw a point a robust run, where the runs recorded what a batch costs and it differs."""
    attack = strongest_attack([each.run for each in drawn])
    known = [each for each in drawn if _cost(each.run) and attack in each.run.evaluations]
    if attack is None or not known:
        return
    accuracies = [each.run.evaluations[attack].accuracy for each in known]
    # One that is not robust would press the others together.
    shown = [each for each, a in zip(known, accuracies, strict=True) if a > max(accuracies) / 2]
    if len({_cost(each.run) for each in shown}) < 2:
        return
    points = [(_cost(each.run), 100 * each.run.evaluations[attack].accuracy) for each in shown]
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    best = _unbeaten(points)
    costs = [cost for cost, _ in points]
    axes.step(*zip(*best, strict=True), where="post", color=GREY, linestyle=":", linewidth=1)
    for each, point in zip(shown, points, strict=True):
        axes.errorbar(
            *point,
            yerr=interval_bar(each.run.evaluations[attack]),
            fmt=each.marker,
            color=each.colour,
            markersize=7,
            markerfacecolor=(each.colour, 0.35),
            elinewidth=1.2,
        )
    if max(costs) > _WIDE * min(costs):
        axes.set_xscale("log")
    axes.margins(0.18)
    axes.set(
        xlabel="cost of training (in epochs of natural training)",
        ylabel=f"{attack_name(attack)} accuracy (%)",
    )
    named = [(each.run.label, point) for each, point in zip(shown, points, strict=True)]
    write_names(figure, axes, named)
    missing = [each.run.label for each in drawn if each not in shown]
    cheapest, dearest = (
        next(name for name, point in named if point == end) for end in (best[0], best[-1])
    )
    album.add(
        figure,
        "cost",
        "Robustness against what training cost",
        f"A point for each of {len(shown)} runs, cost of training to the right and accuracy under "
        f"{attack_name(attack)} upwards. The line of what is not surpassed for less goes from "
        f"{cheapest} at {best[0][1]:.1f}\N{NO-BREAK SPACE}% to {dearest} at "
        f"{best[-1][1]:.1f}\N{NO-BREAK SPACE}%.",
        "Each point is a run: the further up, the more test images it still classifies under "
        f"{attack_name(attack)}, and the further right, the more passes through the network its "
        "training took. The unit is an epoch of natural training, three passes an image, so that "
        "the machine, its load and the precision do not count. The dotted line joins the runs "
        "that none of at most their cost surpasses. The bars are 95 % intervals for the finite "
        "number of test images. Runs with less than half of the best one's accuracy are left out."
        + (f" Not shown: {', '.join(missing)}." if missing else ""),
        f"a run below the line spent more than another, or as much, for less. The line begins at "
        f"{cheapest} and ends at {dearest}.",
    )


def _cost(run: Run) -> float:
    return run.batch_cost * run.epochs_done


def _unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return, by rising cost, the points that none of at most their cost surpasses."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best
