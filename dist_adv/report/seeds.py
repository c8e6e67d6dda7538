"""One experiment from several seeds: mean and standard deviation."""

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dist_adv.report.tables import Cell, Column, Table, attack_name, attack_order, method_name
from dist_adv.runs.run import Run
from dist_adv.text import duration


def seed_tables(runs: Sequence[Run]) -> list[Table]:
    """Return a table of each set of finished runs that differ in their seeds alone.

    Of a seed that is there more than once the first run counts.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault(_experiment(run), {}) if run.finished else {}
        group.setdefault(_seed(run), run)  # the same seed again says nothing new
    several = [list(group.values()) for group in groups.values() if len(group) > 1]
    return [_table(several)] if several else []


def _seed(run: Run) -> int:
    return run.config["train"]["seed"]


def _experiment(run: Run) -> str:
    """Return the configuration without the seed, where the data lie, and where metrics go."""
    config: dict[str, Any] = {**run.config, "track": None}
    config["train"] = {**config["train"], "seed": None}
    config["data"] = {**config["data"], "root": None}
    return json.dumps([config, run.env.get("by_epoch")], sort_keys=True)


def _table(groups: Sequence[Sequence[Run]]) -> Table:
    attacks = sorted(
        {attack for group in groups for run in group for attack in run.evaluations},
        key=attack_order,
    )
    rows = []
    for group in groups:
        accuracies = {
            attack: [run.evaluations[attack].accuracy for run in group if attack in run.evaluations]
            for attack in attacks
        }
        rows.append(
            [
                Cell(", ".join(run.label for run in group)),
                Cell(method_name(group[0])),
                Cell(str(len(group))),
                Cell(", ".join(str(_seed(run)) for run in group)),
                *(_spread(accuracies[attack], len(group), _percent) for attack in attacks),
                _spread([run.seconds for run in group if run.seconds], len(group), duration),
            ]
        )
    return Table(
        "Seeds",
        "Runs whose configurations differ in the seed alone, the first of each seed: the mean over "
        "the runs, and below it "
        "their standard deviation (of a sample: divided by n - 1). It says how far a figure moves "
        "from run to run, which the interval of one run does not.",
        [
            Column("Runs"),
            Column("Method"),
            Column("n", numeric=True),
            Column("Seeds"),
            *(Column(attack_name(attack), numeric=True) for attack in attacks),
            Column("Training time", numeric=True),
        ],
        rows,
    )


def _spread(values: Sequence[float], runs: int, write: Callable[[float], str]) -> Cell:
    """Mean and standard deviation; the number of values where some runs have none."""
    if not values:
        return Cell("-")
    detail = [] if len(values) < 2 else [f"\N{PLUS-MINUS SIGN} {write(statistics.stdev(values))}"]
    if len(values) < runs:
        detail.append(f"n = {len(values)}")
    mean = statistics.fmean(values)
    return Cell(write(mean), detail=", ".join(detail), value=mean)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"
