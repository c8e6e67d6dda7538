"""Read what training and evaluation left in a run folder.

Nothing here needs the data set, the model or torch: a report can be written on a laptop from
folders that were copied from the machine that trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from dist_adv import records
from dist_adv.errors import UserError

Record = dict[str, Any]

# What the report reads without asking whether it is there; everything else is optional.
_CONFIG_KEYS = {
    "method": ("name",),
    "threat": ("norm", "eps"),
    "model": ("name",),
    "data": ("name",),
    "train": ("epochs", "batch_size", "precision", "seed"),
}
_METRIC_KEYS = {
    "train": ("epoch", "step", "seconds"),
    "epoch": ("epoch", "step", "seconds", "train_loss", "train_accuracy"),
}
_RESULT_KEYS = ("attack", "accuracy", "ci95", "n")


@dataclass(frozen=True)
class Evaluation:
    """The final weights under one attack ("natural" is the attack that changes nothing)."""

    attack: str
    accuracy: float
    interval: tuple[float, float]  # 95 %, of the accuracy
    n: int
    flags: tuple[str, ...]  # warnings of the evaluation about itself
    record: Mapping[str, Any]  # the whole line, with the attack's settings


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
    """One run folder. `label` names it uniquely within the report."""

    folder: Path
    label: str
    config: Mapping[str, Any]
    env: Mapping[str, Any]
    metrics: Sequence[Record]
    evaluations: Mapping[str, Evaluation]
    examples: Examples | None
    finished: bool

    @cached_property
    def epochs(self) -> list[Record]:
        """The lines that close an epoch, in order."""
        return [record for record in self.metrics if record["kind"] == "epoch"]

    def curve(self, key: str) -> list[Record]:
        """The epoch lines that hold `key`: the curves need not be evaluated after every epoch."""
        return [record for record in self.epochs if key in record]

    @property
    def passes(self) -> float:
        """Passes over the data so far."""
        return float(self.metrics[-1]["epoch"]) if self.metrics else 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps so far."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def seconds(self) -> float | None:
        """Wall time of training alone so far."""
        return float(self.metrics[-1]["seconds"]) if self.metrics else None

    @property
    def epoch_seconds(self) -> float | None:
        """Mean training time of a pass: right also for passes cut short by a stop or a resume."""
        return self.seconds / self.passes if self.seconds and self.passes else None

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
    """The attack to compare runs by: on the most runs, then with the lowest mean accuracy."""
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
    """The most robust run of each method: by the strongest attack, else by its last curve."""
    attack = strongest_attack(runs)

    def robustness(run: Run) -> tuple[float, float]:
        evaluation, curve = run.evaluations.get(attack or ""), run.curve("pgd_accuracy")
        return (
            evaluation.accuracy if evaluation else -1.0,
            curve[-1]["pgd_accuracy"] if curve else -1.0,
        )

    return {run.config["method"]["name"]: run for run in sorted(runs, key=robustness)}


def _label(folder: Path, folders: Sequence[Path]) -> str:
    """The shortest end of the path that no other folder shares."""
    for depth in range(1, len(folder.parts)):
        end = folder.parts[-depth:]
        if sum(other.parts[-depth:] == end for other in folders) == 1:
            return str(Path(*end))
    return str(folder)


def _read_run(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder; check the path")
    return Run(
        folder=folder,
        label=label,
        config=_read_config(folder / "config.yaml"),
        env=_read_env(folder / "env.json"),
        metrics=_read_metrics(folder / "metrics.jsonl"),
        evaluations=_read_evaluations(folder / "results.jsonl"),
        examples=_read_examples(folder / "examples.safetensors"),
        finished=(folder / "model.safetensors").exists(),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing, so this is not a run folder; name a folder that training wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_line(error)}); restore the file") from error


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config: Mapping[str, Any] = yaml.safe_load(_read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({_line(error)}); restore the file") from error
    for section, keys in _CONFIG_KEYS.items():
        for key in keys:
            try:
                config[section][key]
            except (KeyError, TypeError):
                raise UserError(
                    f"{path}: {section}.{key} is missing; restore the file that training wrote"
                ) from None
    return config


def _read_env(path: Path) -> Mapping[str, Any]:
    try:
        env = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({_line(error)}); restore the file") from error
    if not isinstance(env, dict):
        raise UserError(f"{path}: not a JSON object; restore the file that training wrote")
    return env


def _read_metrics(path: Path) -> list[Record]:
    """The log of training, with the stretches that a resumed run repeated only once."""
    latest: dict[tuple[str, int], Record] = {}
    newest = 0
    for number, record in records.read(path):
        kind = record.get("kind")
        if kind not in _METRIC_KEYS:
            raise UserError(f"{path}: line {number} is of unknown kind {kind!r}; remove the line")
        records.require(record, _METRIC_KEYS[kind], path, number)
        step = record["step"]
        if step < newest:  # resumed from an older checkpoint: what was logged beyond it is void
            latest = {key: old for key, old in latest.items() if key[1] <= step}
        latest[kind, step] = record
        newest = step
    return list(latest.values())


def _read_evaluations(path: Path) -> dict[str, Evaluation]:
    """The final weights under each attack on the most images, and among those the last."""
    evaluations: dict[str, Evaluation] = {}
    for number, record in records.of_final_weights(records.read(path)):
        records.require(record, _RESULT_KEYS, path, number)
        earlier = evaluations.get(record["attack"])
        if earlier and earlier.n > record["n"]:
            continue  # a quick look at some images does not replace a figure on all of them
        low, high = record["ci95"]
        evaluations[record["attack"]] = Evaluation(
            attack=record["attack"],
            accuracy=record["accuracy"],
            interval=(low, high),
            n=record["n"],
            flags=tuple(record.get("flags", ())),
            record=record,
        )
    return evaluations


def _read_examples(path: Path) -> Examples | None:
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
            f"{path}: not readable as example images ({_line(error)}); remove or rewrite the file"
        ) from error


def _line(error: Exception) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())
