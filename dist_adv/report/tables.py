"""The report's tables, and how names and numbers are written in them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_adv.report.gap import AUTOATTACK, gap, rival_of_autoattack
from dist_adv.runs.reading import Evaluation
from dist_adv.runs.run import Run
from dist_adv.text import duration, percent, pixels

# What besides its name decides what an evaluation's accuracy means: keys of results.jsonl and
# column titles.
SETTINGS = {
    "norm": "Norm",
    "eps": "eps",
    "steps": "Steps",
    "step_size": "Step size",
    "restarts": "Restarts",
    "init": "Start",
    "loss_fn": "Loss",
    "iterate": "Iterate",
    "n": "Images",
    "dataset": "Data",
    "split": "Split",
    "precision": "Precision",
    "seed": "Seed",
}

# Of runs from before a run recorded its method's description, and of publications: a method's
# options and how each is introduced.
_METHOD_OPTIONS = {
    "pgd": {"steps": "K = ", "alpha": "alpha ", "init": "init "},
    "free": {"replays": "m = ", "alpha": "alpha "},
    "fast": {"alpha": "alpha ", "init": "init "},
}
_METHOD_TITLES = {"natural": "Natural", "pgd": "PGD", "free": "Free", "fast": "Fast"}
_ATTACK_TITLES = {
    "natural": "Natural",
    "noise": "Noise",
    "apgd-ce": "APGD-CE",
    "apgd-t": "APGD-T",
    "fab-t": "FAB-T",
    "square": "Square",
    AUTOATTACK: "AutoAttack",
}


@dataclass(frozen=True)
class Column:
    """A column's title; numbers are aligned to the right."""

    title: str
    numeric: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a smaller addition, and two marks.

    value: what the cell is sorted by, where its text is a number in changing units.
    """

    text: str
    detail: str = ""
    best: bool = False
    flagged: bool = False
    value: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Table:
    """A table with a heading and a note for its reader. `of` is what its rows are, for a count."""

    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    of: str = "rows"


def interval(evaluation: Evaluation) -> str:
    """Return the 95 % interval of an accuracy in percent."""
    low, high = evaluation.interval
    return f"{percent(low)}\N{EN DASH}{percent(high)}"


def attack_name(attack: str) -> str:
    """Return an attack as readers know it: pgd-10 is PGD-10."""
    family = attack.split("-")[0]
    return attack.upper() if family in ("fgsm", "pgd") else _ATTACK_TITLES.get(attack, attack)


def attack_order(attack: str) -> tuple[int, tuple[int, ...], str]:
    """Sort key: natural, FGSM, PGD by steps and restarts, everything else, AutoAttack."""
    families = ("natural", "fgsm", "pgd", "", AUTOATTACK)
    family = attack.split("-")[0]
    rank = families.index(family if family in families else "")
    return rank, tuple(map(int, re.findall(r"\d+", attack))), attack


def threat_name(run: Run) -> str:
    """Return the perturbations that a run trained against."""
    return f"eps {pixels(run.config['threat']['eps'])} ({run.config['threat']['norm']})"


def method_title(run: Run) -> str:
    """Return the training method as a title."""
    return run.env.get("method", {}).get("title") or _title(run.config["method"])


def method_options(run: Run) -> str:
    """Return the options that tell two runs of one method apart."""
    recorded = run.env.get("method", {}).get("settings")
    return _options(run.config["method"]) if recorded is None else recorded


def method_name(run: Run) -> str:
    """Return the training method with its options, for prose."""
    return ", ".join(filter(None, (method_title(run), method_options(run))))


def name_method(method: Mapping[str, Any]) -> str:
    """Return a method's name and options from its section, of which keys may be missing."""
    return ", ".join(filter(None, (_title(method), _options(method))))


def _title(method: Mapping[str, Any]) -> str:
    return _METHOD_TITLES.get(method["name"], method["name"])


def _options(method: Mapping[str, Any]) -> str:
    parts = []
    for key, introduction in _METHOD_OPTIONS.get(method["name"], {}).items():
        value = method.get(key)
        if value is not None:
            parts.append(introduction + (pixels(value) if key == "alpha" else str(value)))
    if method.get("guard") == "stop":
        parts.append("guard stop")
    return ", ".join(parts)


def variant(model: Mapping[str, Any]) -> list[str]:
    """Return in words how a network is unlike others of its name: raw, no_final_norm.

    model: the section of a configuration, whose keys an older run may lack.
    """
    kinds = {
        "raw": model.get("shortcut") == "raw",
        "no_final_norm": not model.get("final_norm", True),
    }
    return [word for word, unusual in kinds.items() if unusual]


def epochs(run: Run) -> str:
    """Epochs, of those planned where it stopped earlier."""
    done, planned = round(run.epochs_done, 1), run.config["train"]["epochs"]
    return f"{done:g} of {planned}" if done < planned else f"{done:g}"


def reference(runs: Sequence[Run]) -> list[Table]:
    """Return what to look up: how the results were measured, and where."""
    return [_settings(runs), _environments(runs)]


def results(runs: Sequence[Run]) -> Table:
    """Return a row a run: its accuracies, and what they cost; first what AutoAttack has judged."""
    runs = sorted(runs, key=lambda run: AUTOATTACK not in run.evaluations)
    attacks = sorted({attack for run in runs for attack in run.evaluations}, key=attack_order)
    columns = {
        Column("Run"): [
            Cell(run.label, detail="" if run.finished else "unfinished") for run in runs
        ],
        Column("Method"): [Cell(method_title(run), detail=method_options(run)) for run in runs],
        **{
            Column(attack_name(attack), numeric=True): [
                _accuracy(run, attack, runs) for run in runs
            ]
            for attack in attacks
        },
        **_gaps(runs),
        Column("Epochs", numeric=True): [Cell(epochs(run)) for run in runs],
        Column("Optimiser steps", numeric=True): [Cell(f"{run.steps:,}") for run in runs],
        Column("Training time", numeric=True): [time_cell(run.seconds) for run in runs],
        Column("Mean epoch time", numeric=True): [time_cell(run.epoch_seconds) for run in runs],
    }
    alike = []
    for column, cells in _settings_of_runs(runs).items():
        if len(runs) > 1 and len(set(cells)) == 1:
            alike.append(f"{column.title.lower()} {cells[0].text}")
        else:
            columns[column] = cells
    return Table(
        "Results",
        "Accuracy on test images in percent, with its 95 % Wilson interval; the best under each "
        "attack is bold. An epoch shows every training image once; Free takes m optimiser steps on "
        "each minibatch of it. Times are of training alone, without the evaluation of curves."
        + _judged(runs)
        + (f" Alike in all runs: {', '.join(alike)}." if alike else ""),
        list(columns),
        list(zip(*columns.values(), strict=True)),
        of="runs",
    )


def _gaps(runs: Sequence[Run]) -> dict[Column, list[Cell]]:
    attack = rival_of_autoattack(runs)
    if attack is None:
        return {}
    points = [gap(run, attack) for run in runs]
    return {
        Column(f"Gap to {attack_name(attack)}", numeric=True): [
            Cell("-") if each is None else Cell(in_points(each), value=each) for each in points
        ]
    }


def _judged(runs: Sequence[Run]) -> str:
    """Return what AutoAttack changes about the table, in sentences."""
    judged = [run for run in runs if AUTOATTACK in run.evaluations]
    said = " Runs that AutoAttack has judged come first." if 0 < len(judged) < len(runs) else ""
    attack = rival_of_autoattack(runs)
    if attack:
        said += (
            f" Gap to {attack_name(attack)}: the points by which AutoAttack leaves less of the "
            "same images; none where they were not the same."
        )
    return said


def in_points(points: float) -> str:
    """Return a difference of accuracies in percentage points; never as -0.0."""
    return f"{round(points, 1) + 0.0:.1f}".replace("-", "\N{MINUS SIGN}")


def time_cell(seconds: float | None) -> Cell:
    """Return a time in the unit in which it is easiest to grasp, sorted by its seconds."""
    return Cell(_or_dash(seconds, duration), value=seconds)


def _settings_of_runs(runs: Sequence[Run]) -> dict[Column, list[Cell]]:
    """Return what need not be told in a row of each run where it is the same for all."""
    added = [_additions(run) for run in runs]
    return {
        **({Column("With"): [Cell(words or "-") for words in added]} if any(added) else {}),
        Column("Model"): [Cell(_model_name(run)) for run in runs],
        Column("Batch size", numeric=True): [
            Cell(str(run.config["train"]["batch_size"])) for run in runs
        ],
        Column("Ranks", numeric=True): [Cell(str(run.env.get("world_size", "-"))) for run in runs],
        Column("Precision"): [Cell(run.precision) for run in runs],
        Column("Seed", numeric=True): [Cell(str(run.config["train"]["seed"])) for run in runs],
    }


_MIXING = {"mixup": "mixup", "cutmix": "CutMix", "randaugment": "RandAugment"}


def _additions(run: Run) -> str:
    """Return what was added to the method, in words; older configurations lack the keys."""
    config, added = run.config, []
    if average := config.get("average"):
        added.append(f"average of {average['epochs']:g} epochs")
    if awp := config.get("awp"):
        added.append(f"AWP {awp['gamma']:g}")
    if smoothing := config["train"].get("label_smoothing"):
        added.append(f"label smoothing {smoothing:g}")
    if ramp := config["threat"].get("warmup"):
        added.append(f"eps warm-up of {ramp:g} epochs")
    if config.get("optim", {}).get("name") == "adamw":
        added.append("AdamW")
    if start := config["train"].get("start"):
        added.append(f"weights of {start}")
    if extra := config["data"].get("extra"):
        added.append(f"{extra['fraction']:.0%} generated images")
    if config["data"].get("augment", True):
        added += [name for key, name in _MIXING.items() if config["data"].get(key)]
    for first, changes in run.env.get("by_epoch", {}).items():
        added.append(f"from epoch {int(first) + 1} on {changes}")
    return ", ".join(added)


def _model_name(run: Run) -> str:
    model = run.config["model"]
    about = [f"width {model['width']}"] if "width" in model else []
    about += [word.replace("_", " ") for word in variant(model)]
    return f"{model['name']} ({', '.join(about)})" if about else model["name"]


def _accuracy(run: Run, attack: str, runs: Sequence[Run]) -> Cell:
    evaluation = run.evaluations.get(attack)
    if evaluation is None:
        return Cell("-")
    rivals = [other.evaluations[attack].accuracy for other in runs if attack in other.evaluations]
    return Cell(
        percent(evaluation.accuracy),
        detail=interval(evaluation),
        best=attack != "natural" and len(rivals) > 1 and evaluation.accuracy == max(rivals),
        flagged=bool(evaluation.flags),
    )


def _settings(runs: Sequence[Run]) -> Table:
    """One row for each way in which an attack was run, naming the runs where ways differ."""
    evaluated = [run for run in runs if run.evaluations]
    users: dict[tuple[Cell, ...], list[str]] = {}
    for run in evaluated:
        for evaluation in run.evaluations.values():
            settings = (_setting(key, evaluation.record.get(key)) for key in SETTINGS)
            users.setdefault((Cell(evaluation.attack), *settings), []).append(run.label)
    rows = [
        [
            Cell(attack_name(attack.text)),
            *settings,
            Cell("all" if len(labels) == len(evaluated) else ", ".join(labels)),
        ]
        for (attack, *settings), labels in sorted(
            users.items(), key=lambda item: attack_order(item[0][0].text)
        )
    ]
    numeric = {"eps", "steps", "step_size", "restarts", "n", "seed"}
    return Table(
        "Attack settings",
        "A robust accuracy means something only together with the attack that it was measured by: "
        "more steps, more restarts or a larger eps make a stronger attack and a lower number.",
        [
            Column("Attack"),
            *(Column(title, numeric=key in numeric) for key, title in SETTINGS.items()),
            Column("Runs"),
        ],
        rows,
    )


def _setting(key: str, value: Any) -> Cell:
    if value is None:
        return Cell("-")
    if key in ("eps", "step_size"):
        return Cell(pixels(value), value=value)
    return Cell(f"{value:,}" if key == "n" else str(value))


def _environments(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        env = run.env
        hardware, dataset = env.get("hardware", {}), env.get("dataset", {})
        values = (
            hardware.get("device"),
            hardware.get("name"),
            hardware.get("cores"),
            hardware.get("threads"),
            dataset.get("name", run.config["data"]["name"]),
            dataset.get("train"),
            dataset.get("test"),
            env.get("python"),
            env.get("torch"),
            env.get("accelerate"),
            env.get("dist_adv"),
            env.get("git_commit"),
            str(env["started"])[:16].replace("T", " ") if env.get("started") else None,
        )
        rows.append([Cell(run.label), *(Cell(_or_dash(value, _plain)) for value in values)])
    return Table(
        "Hardware, data and versions",
        "What each run recorded about itself when it started. Training times of different "
        "hardware do not compare.",
        [
            Column("Run"),
            Column("Device"),
            Column("Name"),
            Column("Cores", numeric=True),
            Column("Threads", numeric=True),
            Column("Data"),
            Column("Train", numeric=True),
            Column("Test", numeric=True),
            Column("Python"),
            Column("torch"),
            Column("accelerate"),
            Column("dist_adv"),
            Column("Commit"),
            Column("Started"),
        ],
        rows,
        of="runs",
    )


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _or_dash(value: Any, write: Callable[[Any], str]) -> str:
    return "-" if value is None else write(value)
