"""results.csv: one row a run and attack, with the numbers as they were recorded."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_adv.report.tables import attack_order
from dist_adv.runs.reading import Evaluation
from dist_adv.runs.run import Run
from dist_adv.text import shown

_RUN_COLUMNS: dict[str, Callable[[Run], Any]] = {
    "run": lambda run: run.label,
    "folder": lambda run: shown(str(run.folder)),
    "method": lambda run: run.config["method"]["name"],
    "method_steps": lambda run: run.config["method"].get("steps"),
    "method_replays": lambda run: run.config["method"].get("replays"),
    "method_alpha": lambda run: run.config["method"].get("alpha"),
    "method_init": lambda run: run.config["method"].get("init"),
    "norm": lambda run: run.config["threat"]["norm"],
    "eps": lambda run: run.config["threat"]["eps"],
    "model": lambda run: run.config["model"]["name"],
    "dataset": lambda run: run.config["data"]["name"],
    "batch_size": lambda run: run.config["train"]["batch_size"],
    "precision": lambda run: run.precision,
    "seed": lambda run: run.config["train"]["seed"],
    "ranks": lambda run: run.env.get("world_size"),
    "finished": lambda run: run.finished,
    "epochs": lambda run: run.epochs_done,
    "optimiser_steps": lambda run: run.steps,
    "training_seconds": lambda run: run.seconds,
    "epoch_seconds": lambda run: run.epoch_seconds,
}
_EVALUATION_COLUMNS: dict[str, Callable[[Evaluation], Any]] = {
    "attack": lambda evaluation: evaluation.attack,
    "accuracy": lambda evaluation: evaluation.accuracy,
    "ci95_low": lambda evaluation: evaluation.interval[0],
    "ci95_high": lambda evaluation: evaluation.interval[1],
    "n": lambda evaluation: evaluation.n,
    "correct": lambda evaluation: evaluation.record.get("correct"),
    "loss": lambda evaluation: evaluation.record.get("loss"),
    "attack_norm": lambda evaluation: evaluation.record.get("norm"),
    "attack_eps": lambda evaluation: evaluation.record.get("eps"),
    "attack_steps": lambda evaluation: evaluation.record.get("steps"),
    "attack_step_size": lambda evaluation: evaluation.record.get("step_size"),
    "attack_restarts": lambda evaluation: evaluation.record.get("restarts"),
    "attack_init": lambda evaluation: evaluation.record.get("init"),
    "attack_loss_fn": lambda evaluation: evaluation.record.get("loss_fn"),
    "attack_iterate": lambda evaluation: evaluation.record.get("iterate"),
    "attack_seed": lambda evaluation: evaluation.record.get("seed"),
    "attack_precision": lambda evaluation: evaluation.record.get("precision"),
    "attack_seconds": lambda evaluation: evaluation.record.get("seconds"),
    "attack_split": lambda evaluation: evaluation.record.get("split"),
    "flags": lambda evaluation: "; ".join(evaluation.flags),
}


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write the table; values that a run did not record stay empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*_RUN_COLUMNS, *_EVALUATION_COLUMNS))
        for run in runs:
            about_run = [value(run) for value in _RUN_COLUMNS.values()]
            for attack in sorted(run.evaluations, key=attack_order):
                evaluation = run.evaluations[attack]
                writer.writerow(
                    (*about_run, *(value(evaluation) for value in _EVALUATION_COLUMNS.values()))
                )
