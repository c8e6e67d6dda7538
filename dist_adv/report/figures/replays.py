"""What Free's replays gain and cost: accuracy and training time against m."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_adv.report.figures.album import Album, time_unit
from dist_adv.report.figures.colours import MARKERS
from dist_adv.report.tables import attack_name, attack_order
from dist_adv.runs.run import Run
from dist_adv.text import percentage

_BLUES = ("#74A9CF", "#3690C0", "#0570B0", "#034E7B")  # a stronger attack is darker
_BLACK = "#000000"


@dataclass(frozen=True)
class _Series:
    """Runs of different m, by m, and what they have in common."""

    title: str
    runs: Sequence[Run]


def draw(album: Album, runs: Sequence[Run]) -> None:
    """Draw a figure for each setting of everything else in which more than one m was tried."""
    settings: dict[str, list[Run]] = {}
    for run in runs:
        if "replays" in run.config["method"] and run.finished and run.evaluations:
            settings.setdefault(_settings(run), []).append(run)
    for alike in settings.values():
        series = _series(alike)
        if series:
            _draw(album, series)


def _settings(run: Run) -> str:
    """Everything but m and the length of training that an accuracy or a time depends on."""
    keys = ("threat", "model", "data", "optim", "average", "awp")
    config = {key: dict(run.config.get(key) or {}) for key in keys}
    config["data"].pop("root", None)  # the same images on another machine
    method = {key: value for key, value in run.config["method"].items() if key != "replays"}
    # Of older runs those lack that came later, which were none of these then.
    of_train = ("batch_size", "seed", "label_smoothing", "start", "max_steps", "sync_batchnorm")
    train = [run.config["train"].get(key) or None for key in of_train]
    ran = [run.precision, run.env.get("world_size"), run.env.get("by_epoch")]
    return json.dumps([config, method, train, ran], sort_keys=True)


def _series(runs: Sequence[Run]) -> list[_Series]:
    """Those of equal epochs and those of equal optimiser steps, where there is more than one m."""
    groups: dict[tuple[str, float], dict[int, Run]] = {}
    for run in runs:
        m, epochs = run.config["method"]["replays"], run.config["train"]["epochs"]
        groups.setdefault(("epochs", epochs), {}).setdefault(m, run)
        groups.setdefault(("steps", epochs * m), {}).setdefault(m, run)
    return [
        _Series(
            f"{size:g} epochs each"
            if kind == "epochs"
            else f"{next(iter(by_m.values())).steps:,} optimiser steps each",
            [by_m[m] for m in sorted(by_m)],
        )
        for (kind, size), by_m in sorted(groups.items())
        if len(by_m) > 1
    ]


def _draw(album: Album, series: Sequence[_Series]) -> None:
    runs = [run for each in series for run in each.runs]
    shared = set.intersection(*(set(run.evaluations) for run in runs))
    attacks = sorted(shared, key=attack_order)
    if not attacks:
        return
    divisor, unit = time_unit(max(run.seconds or 0 for run in runs))
    figure = Figure(figsize=(3.9 * len(series) + 2.2, 5), layout="constrained")
    accuracies, times = figure.subplots(
        2, len(series), squeeze=False, sharex=True, sharey="row", height_ratios=(2, 1)
    )
    for each, accuracy, time in zip(series, accuracies, times, strict=True):
        m = np.array([run.config["method"]["replays"] for run in each.runs])
        for i, attack in enumerate(attacks):
            apart = 0.09 * (i - (len(attacks) - 1) / 2)  # or the bars would cover each other
            _plot(accuracy, m + apart, each.runs, attack, i)
        accuracy.set(title=each.title, ylabel="accuracy (%)")
        seconds = [run.seconds or np.nan for run in each.runs]
        time.plot(m, np.divide(seconds, divisor), color=_BLACK, marker="o")
        time.set(xlabel="m, optimiser steps on each batch", ylabel=f"training time ({unit})")
        time.set_xticks(sorted({run.config["method"]["replays"] for run in runs}))
        time.set_ylim(bottom=0)
    figure.legend(*accuracies[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    album.add(
        figure,
        "replays",
        "Accuracy and training time against Free's m",
        f"Line charts against m, accuracy above and training time below, of {_names(runs)}: "
        f"{_look(series[0], attacks[-1])}",
        "Runs that differ only in m and in how long they trained, the first of each. "
        "With equal epochs, a larger m means more optimiser steps and more time; "
        "with equal optimiser steps it means that each image is seen in fewer epochs, "
        "for about the same time. The first shows what m buys, the second what it costs in "
        "diversity of the batches. Bars are 95 % intervals for the finite number of test images; "
        "the points are moved apart a little sideways.",
        _look(series[0], attacks[-1]),
    )


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(dict.fromkeys(run.label for run in runs))


def _plot(axes: Axes, x: np.ndarray, runs: Sequence[Run], attack: str, place: int) -> None:
    evaluations = [run.evaluations[attack] for run in runs]
    accuracy = np.array([100 * evaluation.accuracy for evaluation in evaluations])
    low, high = (100 * np.array([evaluation.interval for evaluation in evaluations])).T
    axes.errorbar(
        x,
        accuracy,
        yerr=np.maximum(0, [accuracy - low, high - accuracy]),  # an end may be an ulp beyond 0 or 1
        color=_BLACK if attack == "natural" else _BLUES[min(place, len(_BLUES)) - 1],
        marker=MARKERS[place % len(MARKERS)],
        label=attack_name(attack),
    )


def _look(series: _Series, attack: str) -> str:
    """Return what the largest m gained over the smallest, and for how much."""
    least, most = series.runs[0], series.runs[-1]
    before, after = (percentage(run.evaluations[attack].accuracy) for run in (least, most))
    cost = ""
    if least.seconds and most.seconds:
        cost = f" for {most.seconds / least.seconds:.1f} times the training time"
    return (
        f"from m = {least.config['method']['replays']} to m = {most.config['method']['replays']} "
        f"in {series.title}, accuracy under {attack_name(attack)} goes from {before} to {after}"
        f"{cost}."
    )
