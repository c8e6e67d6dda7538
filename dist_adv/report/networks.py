"""Runs whose networks are looked at side by side, and what is seen there in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_adv.errors import UserError
from dist_adv.report.tables import Cell, Column, Table, method_options, method_title
from dist_adv.runs.run import Examples, Run, best_of_each_method
from dist_adv.text import percent, pixels

if TYPE_CHECKING:
    from dist_adv.report.landscape import Landscape

_ORDER = ("natural", "free", "fast", "pgd")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs whose networks were looked at, around which images, and what was seen."""

    runs: Sequence[Run]
    examples: Examples
    landscape: "Landscape"


def compare(runs: Sequence[Run]) -> tuple[Comparison | None, str]:
    """Look at the networks of the runs that compare; None where there are not two.

    The tables and curves need no network: where one cannot be had, or does not fit the example
    images, there is no comparison either, and why is the second.
    """
    chosen = comparable(runs)
    if len(chosen) < 2:
        return None, ""
    from dist_adv.report.landscape import survey_runs  # a report without networks needs no torch

    examples = chosen[0].examples
    assert examples is not None
    try:
        return Comparison(chosen, examples, survey_runs(chosen, examples)), ""
    except UserError as error:
        return None, f"networks are not compared: {error}"


def comparable(runs: Sequence[Run]) -> list[Run]:
    """Return, of each method, the finished run that withstands the strongest attack best.

    Runs compare where their threat, their classes and the size of their images are the same; of
    several such groups the one of the most methods is taken.
    """
    groups: dict[object, list[Run]] = {}
    for run in runs:
        if run.finished and run.examples:
            threat, images = run.config["threat"], run.examples
            kind = threat["norm"], threat["eps"], *images.classes, *images.clean.shape[1:]
            groups.setdefault(kind, []).append(run)
    best = max(map(best_of_each_method, groups.values()), key=len, default={})
    return sorted(best.values(), key=_place)


def _place(run: Run) -> int:
    name = run.config["method"]["name"]
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return the numbers behind the figures."""
    return [_loss_table(comparison), _target_table(comparison)]


def _loss_table(comparison: Comparison) -> Table:
    surfaces = comparison.landscape.surfaces
    middle = len(surfaces[0].offsets) // 2
    return Table(
        "The loss around test images",
        f"Cross-entropy loss around {len(surfaces[0].loss)} test images, on a grid of "
        f"{grid_of(comparison)}. Range: largest less smallest loss on the grid. Deviation: the "
        "largest distance on the grid between the loss and its tangent plane at the image (the "
        "local linearity measure of Qin et al. 2019, with the grid as the neighbourhood). Means "
        "over the images; small figures mean a flat and nearly linear loss.",
        [
            Column("Run"),
            Column("Method"),
            *(
                Column(title, numeric=True)
                for title in ("Loss at the image", "Largest loss", "Range", "Deviation")
            ),
        ],
        [
            [
                Cell(run.label),
                Cell(method_title(run), detail=method_options(run)),
                Cell(f"{surface.loss[:, middle, middle].mean():.2f}"),
                Cell(f"{surface.loss.max((1, 2)).mean():.2f}"),
                Cell(f"{surface.range.mean():.2f}"),
                Cell(f"{surface.deviation.mean():.2f}"),
            ]
            for run, surface in zip(comparison.runs, surfaces, strict=True)
        ],
    )


def _target_table(comparison: Comparison) -> Table:
    landscape = comparison.landscape
    titles = [method_title(run) for run in comparison.runs]
    makers = [*(f"attacking {title}" for title in titles), "no attack"]
    return Table(
        "Target classes reached by large perturbations",
        f"Percent of {landscape.pairs} pairs of a test image and a wrong class in which a network "
        f"(column) takes the image for that class, after {attack_of(comparison)} on the network of "
        "the row. Noise that misleads one network means little to the others; features of the "
        "class convince them, too.",
        [
            Column("Images made by"),
            *(Column(f"Read by {title}", numeric=True) for title in titles),
        ],
        [
            [Cell(maker), *(Cell(percent(share)) for share in row)]
            for maker, row in zip(makers, landscape.reached, strict=True)
        ],
    )


def grid_of(comparison: Comparison) -> str:
    offsets = comparison.landscape.surfaces[0].offsets
    return (
        f"{len(offsets)} x {len(offsets)} points, up to eps {pixels(offsets[-1])} to either side "
        "along the network's own adversarial direction (steepest ascent at the image) and along a "
        "random one (-1 or 1 in every pixel), which is the same for all networks"
    )


def attack_of(comparison: Comparison) -> str:
    attack, ball = comparison.landscape.attack, comparison.landscape.attack.threat
    return (
        f"{attack.steps} PGD steps of {pixels(attack.step_size)} within eps {pixels(ball.eps)} "
        f"({ball.norm}) towards the class"
    )
