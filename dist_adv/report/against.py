"""Runs beside the published figures that they should reproduce."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_adv.report.published import IN_PIXELS, WITHOUT, Row, Settings, Source
from dist_adv.report.tables import (
    Cell,
    Column,
    Table,
    attack_name,
    attack_order,
    epochs,
    interval,
    name_method,
)
from dist_adv.runs.reading import Evaluation
from dist_adv.runs.run import Run
from dist_adv.text import duration, percent, pixels

REPRODUCED = "reproduced"
# Keys whose last part says too little, or something else than readers do.
_LABELS = {
    "data.name": "data",
    "train.epochs": "epochs",
    "train.batch_size": "batch",
    "n": "test images",
    "init": "start of the attack",
}
# What runs had when there was no choice.
_BEFORE_THE_KEY = {
    **WITHOUT,
    "model.shortcut": "activated",
    "method.guard_rule": "wong",
}
_SPACE = "\N{NO-BREAK SPACE}"
# Differences in these leave the experiment what it is: fewer test images widen our interval.
_IMMATERIAL = {"train.precision", "n"}


@dataclass(frozen=True)
class Figure:
    """An accuracy of a run beside the published one, which is in percent."""

    attack: str
    ours: Evaluation
    published: float

    @property
    def difference(self) -> float:
        """In points; above 0 where ours is the higher one."""
        return 100 * self.ours.accuracy - self.published

    @property
    def inside(self) -> bool:
        """Whether the published accuracy lies in the 95 % interval of ours."""
        low, high = self.ours.interval
        rounding = 1e-9  # intervals that begin at 0 may begin just above it
        return low - rounding <= self.published / 100 <= high + rounding


@dataclass(frozen=True, eq=False)
class Pair:
    """A run beside a published row; or a run without a row, or a row without a run."""

    run: Run | None
    row: Row | None
    figures: Sequence[Figure] = ()
    differences: Sequence[str] = ()
    verdict: str = ""


def set_beside(runs: Sequence[Run], source: Source) -> list[Pair]:
    """Each run beside the nearest row of the source, then the rows for which there is no run.

    Rows between which nothing decides (the best and the final weights of one run) all count.
    """
    compared = []
    for run in runs:
        nearest = _nearest(run, source.rows)
        compared += [_pair(run, row, source.evaluation) for row in nearest]
        if not nearest:
            compared.append(Pair(run, None))
    met = {each.row for each in compared}
    return compared + [Pair(None, row) for row in source.rows if row not in met]


def _nearest(run: Run, rows: Sequence[Row]) -> list[Row]:
    """Of the rows with the run's method, model and threat: by guard, then batch, then epochs."""

    def distance(row: Row) -> tuple[float, ...]:
        guard = "method.guard"
        apart = not _same(_setting(run, guard), row.settings[guard])
        return apart, _ratio(run, row, "train.batch_size"), _ratio(run, row, "train.epochs")

    matching = [row for row in rows if all(_same(_setting(run, k), v) for k, v in _identity(row))]
    least = min(map(distance, matching), default=None)
    return [row for row in matching if distance(row) == least]


def _identity(row: Row) -> list[tuple[str, Any]]:
    return [
        (key, value)
        for key, value in row.settings.items()
        if key == "model.name"
        or (
            key.startswith(("method.", "threat."))
            and not key.startswith("method.guard")
            and key not in WITHOUT
        )
    ]


def _ratio(run: Run, row: Row, key: str) -> float:
    """How many times larger one is than the other, as a logarithm; 0 where it is not known."""
    return abs(math.log(_setting(run, key) / row.settings[key])) if key in row.settings else 0.0


def _setting(run: Run, key: str) -> Any:
    """Return what the run has for a key of published.yaml."""
    if key == "weights":
        return "final"
    if key == "ranks":
        return run.env.get("world_size")
    if key == "train.precision":
        return run.precision
    section, _, name = key.partition(".")
    place = run.config.get(section, {}) if name else run.config
    value = place.get(name or key, _BEFORE_THE_KEY.get(key, "unknown"))
    return "none" if (key, value) == ("method.guard", "warn") else value  # it only speaks


def _same(ours: Any, theirs: Any) -> bool:
    """Equal, numbers up to how they may have been rounded."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-3)
    return bool(ours == theirs)


def _pair(run: Run, row: Row, evaluation: Settings) -> Pair:
    figures = [
        Figure(attack, ours, published)
        for attack, published in row.percent.items()
        if (ours := _evaluation(run, attack))
    ]
    differences = _differences(run, row, figures, evaluation)
    if differences.keys() - _IMMATERIAL:
        verdict = "not the same experiment"
    elif not all(figure.inside for figure in figures):
        verdict = "differs"
    else:
        verdict = REPRODUCED if len(figures) == len(row.percent) else "not all evaluated"
    return Pair(run, row, figures, list(differences.values()), verdict)


def _evaluation(run: Run, attack: str) -> Evaluation | None:
    """By this attack, or else by the same one from a single start: pgd-50 for pgd-50-10."""
    return run.evaluations.get(attack) or run.evaluations.get(attack.rpartition("-")[0])


def _differences(
    run: Run, row: Row, figures: Sequence[Figure], evaluation: Settings
) -> dict[str, str]:
    """In words, by key, all in which the run is known not to be what the row was."""
    ours = {key: [_setting(run, key)] for key in row.settings}
    for key in evaluation:  # natural accuracy has no attack's settings
        records = (figure.ours.record for figure in figures)
        ours[key] = [record[key] for record in records if record.get(key) is not None]
    said = {}
    for key, theirs in {**row.settings, **evaluation}.items():
        others = [value for value in ours[key] if not _same(value, theirs)]
        if others:
            label = _LABELS.get(key, key.rpartition(".")[2].replace("_", " "))
            said[key] = f"{label} {_written(key, others[0])} instead of {_written(key, theirs)}"
    if changes := run.env.get("by_epoch"):
        said["by epoch"] = f"other values by epoch: {'; '.join(changes.values())}"
    if not run.finished:
        said["unfinished"] = f"unfinished: {epochs(run)} epochs"
    return said


def _written(key: str, value: Any) -> str:
    if isinstance(value, float) and key.rpartition(".")[2] in IN_PIXELS:
        return pixels(value)
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_written(name, each)}" for name, each in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def against_table(source: Source, compared: Sequence[Pair]) -> Table:
    """Return what was measured here, what was published, and what to make of it."""
    attacks = sorted({name for row in source.rows for name in row.percent}, key=attack_order)
    rows = [
        [
            _run_cell(each.run),
            _row_cell(each.row),
            *(_figure_cell(each, attack) for attack in attacks),
            _time_cell(each),
            Cell(
                each.verdict or "-",
                best=each.verdict == REPRODUCED,
                detail=", ".join(each.differences),
            ),
        ]
        for each in compared
    ]
    return Table(
        f"Against {source.title}",
        "Accuracy in percent, ours vs the published one; below it the difference in points, and "
        "whether the published one lies inside or outside our 95 % interval, which is that of the "
        "test images alone: another seed moves a figure, too. Verdicts: reproduced, if all "
        "published accuracies of the row lie inside; differs, if one of those measured lies "
        "outside; not all evaluated, if some are missing; not the same experiment, if the run "
        "differs in any setting that is known of the row but the precision or the number of test "
        "images. All differences are listed. "
        f"Published times are of {source.hardware or 'hardware that is not known here'}. "
        f"{source.remark}",
        [
            Column("Run"),
            Column("Published row"),
            *(Column(attack_name(attack)) for attack in attacks),
            Column("Training time"),
            Column("Verdict and differences"),
        ],
        rows,
    )


def _run_cell(run: Run | None) -> Cell:
    if run is None:
        return Cell("not run")
    return Cell(run.label, detail="" if run.finished else "unfinished")


def _row_cell(row: Row | None) -> Cell:
    if row is None:
        return Cell("none of this method, model and threat")
    return Cell(name_method(row.method), detail="; ".join(filter(None, (_about(row), row.remark))))


def _about(row: Row) -> str:
    """Return what tells rows of one method apart."""
    settings = row.settings
    parts = [settings["model.name"]]
    if "train.epochs" in settings:
        parts.append(f"{settings['train.epochs']} epochs")
    if "train.batch_size" in settings:
        parts.append(f"batch {settings['train.batch_size']}")
    return ", ".join(parts)


def _figure_cell(pair: Pair, attack: str) -> Cell:
    for figure in pair.figures:
        if figure.attack == attack:
            side = "inside" if figure.inside else "outside"
            return Cell(
                _versus(percent(figure.ours.accuracy), figure.published),
                detail=f"{_signed(figure.difference)},{_SPACE}{side} {interval(figure.ours)}",
                flagged=bool(figure.ours.flags),
                value=figure.ours.accuracy,
            )
    published = pair.row and pair.row.percent.get(attack)
    return Cell("-" if published is None else _versus("-", published))


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def _time_cell(pair: Pair) -> Cell:
    run, row = pair.run, pair.row
    seconds = (run and run.seconds) or None
    return Cell(
        duration(seconds) if seconds else "-",
        detail=f"vs {row.minutes} min" if row and row.minutes else "",
        value=seconds,
    )


def _versus(ours: str, published: object) -> str:
    return f"{ours} vs {published}".replace(" ", _SPACE)


def write_against(compared: Mapping[str, Sequence[Pair]], path: Path) -> None:
    """Write against.csv: a line for each accuracy of a run that has a published one beside it.

    `compared` is by the name of the publication. Accuracies are in percent, as published.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for source, comparisons in compared.items():
            for each in comparisons:
                for figure in each.figures:
                    writer.writerow(_values(source, each, figure))


_COLUMNS = (
    "against",
    "run",
    "row",
    "attack",
    "ours",
    "ci95_low",
    "ci95_high",
    "published",
    "difference",
    "inside_ci95",
    "training_seconds",
    "published_minutes",
    "verdict",
    "differences",
    "remark",
)


def _values(source: str, pair: Pair, figure: Figure) -> tuple[Any, ...]:
    run, row = pair.run, pair.row
    assert run
    assert row
    return (
        source,
        run.label,
        f"{name_method(row.method)}; {_about(row)}",
        figure.attack,
        100 * figure.ours.accuracy,
        *(100 * end for end in figure.ours.interval),
        figure.published,
        figure.difference,
        figure.inside,
        run.seconds,
        row.minutes,
        pair.verdict,
        ", ".join(pair.differences),
        row.remark,
    )
