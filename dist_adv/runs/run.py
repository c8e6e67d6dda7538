"""Read what training and evaluation left in a run folder.

Nothing here needs the data set, the model or torch: a report can be written on a laptop from
folders that were copied from the machine that trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dist_adv import text
from dist_adv.errors import UserError
from dist_adv.runs import reading
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.reading import Evaluation, Record
from dist_adv.text import shown


@dataclass(frozen=True, eq=False)
class Examples:
    """A few test images before and after an attack, with the model's answers."""

    attack: str
    classes: Sequence[str]
    clean: np.ndarray  # (k, C, H, W) in [0, 1]
    adversarial: np.ndarray
    label: np.ndarray  # (k,)
    clean_prediction: np.ndarray
    adversarial_prediction: np.ndarray


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder, as it was read.

    label: its name, unique among those that were read together; config, env: what config.yaml and
    env.json hold; evaluations: by attack, each with `accuracy`, `interval`, `n` and `flags`.
    """

    folder: Path
    label: str
    config: Mapping[str, Any]
    env: Mapping[str, Any]
    epochs: Sequence[Record]  # the lines that close an epoch, in order
    last: Record | None  # the last line of metrics
    evaluations: Mapping[str, Evaluation]
    elsewhere: int  # evaluations within another threat or on other data, which are not shown
    examples: Examples | None
    finished: bool

    @property
    def metrics(self) -> Sequence[Record]:
        """Every line of metrics, read again: of a long run hundreds of megabytes."""
        return reading.read_metrics(self.folder).lines

    def curve(self, key: str) -> list[Record]:
        """Return the epoch lines that hold `key`: not every epoch need have a curve."""
        return [record for record in self.epochs if key in record]

    @property
    def epochs_done(self) -> float:
        """Epochs so far."""
        return float(self.last["epoch"]) if self.last else 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps so far."""
        return int(self.last["step"]) if self.last else 0

    @property
    def seconds(self) -> float | None:
        """Wall time of training alone so far."""
        return float(self.last["seconds"]) if self.last else None

    @property
    def epoch_seconds(self) -> float | None:
        """Mean training time of an epoch: right also for epochs cut short by a stop or a resume."""
        return self.seconds / self.epochs_done if self.seconds and self.epochs_done else None

    @property
    def batch_cost(self) -> float:
        """How many batches of natural training a batch takes; 0 where it was not recorded."""
        method = self.env.get("method", {})
        return float(method.get("steps", 0) * method.get("passes", 0) / 3)

    @property
    def precision(self) -> str:
        """What `auto` came to, where the run recorded it."""
        return str(self.env.get("precision", self.config["train"]["precision"]))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read each folder once, in the order given."""
    if not folders:
        raise UserError("no runs given: name at least one run folder to report on")
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [_read_run(folder, _label(folder, resolved)) for folder in resolved]


def strongest_attack(runs: Sequence[Run]) -> str | None:
    """Return the attack to compare runs by: on the most runs, then of the lowest mean accuracy."""
    accuracies: dict[str, list[float]] = {}
    for run in runs:
        for evaluation in run.evaluations.values():
            if evaluation.attack != "natural":
                accuracies.setdefault(evaluation.attack, []).append(evaluation.accuracy)
    return min(
        accuracies,
        key=lambda attack: (-len(accuracies[attack]), float(np.mean(accuracies[attack]))),
        default=None,
    )


def best_of_each_method(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the most robust run of each method: by the strongest attack, or its last curve."""
    attack = strongest_attack(runs)

    def robustness(run: Run) -> tuple[float, float]:
        evaluation, curve = run.evaluations.get(attack or ""), run.curve("pgd_accuracy")
        return (
            evaluation.accuracy if evaluation else -1.0,
            curve[-1]["pgd_accuracy"] if curve else -1.0,
        )

    return {run.config["method"]["name"]: run for run in sorted(runs, key=robustness)}


def _label(folder: Path, folders: Sequence[Path]) -> str:
    """Return the shortest end of the path that no other folder shares."""
    for depth in range(1, len(folder.parts)):
        end = folder.parts[-depth:]
        if sum(other.parts[-depth:] == end for other in folders) == 1:
            return str(Path(*end))
    return str(folder)


def _read_run(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder; check the path")
    config = reading.read_config(folder)
    env = reading.read_environment(folder)
    metrics = reading.read_metrics(folder, ("epoch",))
    results = reading.read_results(folder, config["threat"], config["data"]["name"])
    return Run(
        folder=folder,
        label=shown(label),
        config=config,
        env=env,
        epochs=metrics.lines,
        last=metrics.last,
        evaluations=results.figures,
        elsewhere=results.elsewhere,
        examples=read_examples(RunFolder(folder).examples),
        finished=RunFolder(folder).weights.exists(),
    )


def read_examples(path: Path) -> Examples | None:
    """Return example images, None where there is no such file. Raises UserError for a bad one."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            return Examples(
                attack=metadata["attack"],
                classes=json.loads(metadata["classes"]),
                clean=file.get_tensor("clean"),
                adversarial=file.get_tensor("adversarial"),
                label=file.get_tensor("label"),
                clean_prediction=file.get_tensor("clean_prediction"),
                adversarial_prediction=file.get_tensor("adversarial_prediction"),
            )
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not readable as example images ({text.one_line(error)}); "
            f"remove or rewrite the file"
        ) from error
