"""The report's figures, each with the sentences that explain it."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from dist_adv.report.figures import comparisons, examples, training
from dist_adv.report.figures.album import COLOURS, MARKERS, STYLE, Album, Chapter, Drawn
from dist_adv.report.runs import Run
from dist_adv.report.tables import method_name

__all__ = ["draw"]


def draw(runs: Sequence[Run], folder: Path) -> list[Chapter]:
    """Draw every figure for which the runs hold data into `folder`, in place of earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9]-*.png"):
        old.unlink()
    drawn = [
        Drawn(run, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, run in enumerate(runs)
    ]
    album = Album(folder)
    with rc_context(STYLE):
        comparisons.trade_off(album, drawn)
        comparisons.overlay(album, drawn, over_time=False)
        comparisons.overlay(album, drawn, over_time=True)
        chapters = [Chapter("The runs together", album.take())]
        for each in drawn:
            run = each.run
            training.curves(album, each)
            examples.draw(album, run)
            state = "" if run.finished else ", unfinished"
            title = f"{run.label} ({method_name(run)}){state}"
            chapters.append(Chapter(title, album.take()))
    return chapters
