"""The report's figures, each with the sentences that explain it."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import style

from dist_adv.report.figures import (
    cost,
    examples,
    networks,
    overfitting,
    overlays,
    replays,
    trade_off,
    training,
)
from dist_adv.report.figures.album import Album, Chapter
from dist_adv.report.figures.colours import STYLE, give_looks
from dist_adv.report.figures.lettering import Lettering
from dist_adv.report.networks import Comparison
from dist_adv.report.tables import method_name
from dist_adv.runs.run import Run

__all__ = ["draw"]

_UNFOLDED = 2


def draw(runs: Sequence[Run], comparison: Comparison | None, folder: Path) -> list[Chapter]:
    """Draw every figure for which the runs hold data into `folder`, in place of earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9]-*.png"):
        old.unlink()
    lettering = Lettering(runs)
    drawn = give_looks([lettering.run(run) for run in runs])
    album = Album(folder)
    # Not what a matplotlibrc of the reader's asks for: LaTeX may not be there.
    with style.context(["default", {**STYLE, "font.family": lettering.families}]):
        overlays.draw(album, drawn)
        trade_off.draw(album, drawn)
        cost.draw(album, drawn)
        replays.draw(album, [each.run for each in drawn])
        overfitting.draw(album, drawn)
        chapters = [Chapter("The runs together", album.take())]
        if comparison:
            networks.draw(album, lettering.comparison(comparison))
            chapters.append(Chapter("Their networks side by side", album.take()))
        for run, each in zip(runs, drawn, strict=True):
            training.curves(album, each, run.label)
            examples.draw(album, each.run, run.label)
            state = "" if run.finished else ", unfinished"
            title = f"{run.label} ({method_name(run)}){state}"
            chapters.append(Chapter(title, album.take(), folded=len(runs) > _UNFOLDED))
    return chapters
