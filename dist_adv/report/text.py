"""What the report says in sentences: a headline, and what a reader must know before the numbers."""

import json
from collections.abc import Sequence

from dist_adv.report.gap import gap, rival_of_autoattack
from dist_adv.report.primer import data_set
from dist_adv.report.tables import (
    SETTINGS,
    attack_name,
    epochs,
    in_points,
    interval,
    method_name,
    threat_name,
)
from dist_adv.runs.run import Run, best_of_each_method, strongest_attack
from dist_adv.text import duration, percentage


def headline(runs: Sequence[Run]) -> list[str]:
    """Return what the tables say, in a few sentences."""
    sentences = _incomparable(runs)
    attack = strongest_attack(runs)
    if attack is None:
        return [*sentences, "None of these runs has been evaluated under an attack yet."]
    if not sentences:
        sentences = [
            _robustness(runs, attack),
            *_free_against_fast(runs, attack),
            *_gap_to_autoattack(runs),
        ]
    timed = sorted((run.seconds, run.label) for run in runs if run.finished and run.seconds)
    if len(timed) == 1:
        sentences.append(f"Training took {duration(timed[0][0])}.")
    elif timed:
        (least, quickest), (most, slowest) = timed[0], timed[-1]
        sentences.append(
            f"Training took from {duration(least)} ({quickest}) to {duration(most)} ({slowest})."
        )
    return sentences


def _robustness(runs: Sequence[Run], attack: str) -> str:
    rated = sorted(
        (run for run in runs if attack in run.evaluations),
        key=lambda run: -run.evaluations[attack].accuracy,
    )
    best, evaluation = rated[0], rated[0].evaluations[attack]
    name = f"{attack_name(attack)} ({evaluation.n:,} images)"
    result = f"{percentage(evaluation.accuracy)} ({interval(evaluation)})"
    who = f"{best.label} ({method_name(best)})"
    if len(rated) == 1:
        natural = best.evaluations.get("natural")
        start = f"{who} classifies "
        if natural:
            start += f"{percentage(natural.accuracy)} of the natural test images and "
        return f"{start}{result} of the test images under {name}."
    count = len([run for run in runs if run.evaluations])
    share = "all" if len(rated) == count else f"{len(rated)} of {count}"
    sentence = (
        f"Under {name}, the strongest attack that {share} evaluated runs share, {who} has the best "
        f"accuracy: {result}"
    )
    natural_runs = [run for run in rated[1:] if run.config["method"]["name"] == "natural"]
    if natural_runs:
        kept = percentage(natural_runs[0].evaluations[attack].accuracy)
        sentence += f"; natural training ({natural_runs[0].label}) has {kept}"
    close = [
        run.label
        for run in rated[1:]
        if run.evaluations[attack].interval[1] >= evaluation.interval[0]
    ]
    if close:
        sentence += f". Its interval overlaps with that of {_join(close)}, so their order is open"
    return sentence + "."


def _free_against_fast(runs: Sequence[Run], attack: str) -> list[str]:
    """Return the most robust run of each, where both were evaluated."""
    best = best_of_each_method([run for run in runs if attack in run.evaluations])
    if not {"free", "fast"} <= best.keys():
        return []
    parts = []
    for run in (best["free"], best["fast"]):
        evaluation = run.evaluations[attack]
        part = f"{run.label} keeps {percentage(evaluation.accuracy)} ({interval(evaluation)})"
        parts.append(part + (f" after {duration(run.seconds)} of training" if run.seconds else ""))
    return [f"Free against Fast under {attack_name(attack)}: {_join(parts)}."]


def _gap_to_autoattack(runs: Sequence[Run]) -> list[str]:
    attack = rival_of_autoattack(runs)
    if attack is None:
        return []
    found = ((gap(run, attack), run.label) for run in runs)
    gaps = sorted((points, label) for points, label in found if points is not None)
    (least, smallest), (most, largest) = gaps[0], gaps[-1]
    size = f"{in_points(least)} points ({smallest})"
    if len(gaps) > 1:
        size = f"from {size} to {in_points(most)} points ({largest})"
    return [f"AutoAttack lies {size} below {attack_name(attack)} on the same images."]


def notices(runs: Sequence[Run]) -> list[str]:
    """Everything that limits what the numbers mean."""
    return [
        line
        for run in runs
        for line in (*_progress(run), *_guard(run), *_flags(run), *_elsewhere(run))
    ] + _differences(runs)


def _progress(run: Run) -> list[str]:
    if not run.finished:
        return [f"{run.label} is unfinished: {epochs(run)} epochs are logged."]
    if not run.evaluations:
        return [f"{run.label} has finished but its final weights have not been evaluated."]
    return []


def _guard(run: Run) -> list[str]:
    tripped = [record["epoch"] for record in run.epochs if record.get("guard_tripped")]
    if not tripped:
        return []
    line = f"{run.label}: the guard against catastrophic overfitting tripped in epoch {tripped[0]}"
    if run.config["method"].get("guard") == "stop":
        line += "; training stopped there with the last weights from before"
    return [line + "."]


def _flags(run: Run) -> list[str]:
    attacks: dict[str, list[str]] = {}
    for evaluation in run.evaluations.values():
        for flag in evaluation.flags:
            attacks.setdefault(flag, []).append(attack_name(evaluation.attack))
    return [f"{run.label}, {_join(names)}: {flag}" for flag, names in attacks.items()]


def _elsewhere(run: Run) -> list[str]:
    if not run.elsewhere:
        return []
    return [
        f"{run.label}: of its evaluations {run.elsewhere} within another threat or on other data "
        "are not shown (they stay in results.jsonl)."
    ]


def _differences(runs: Sequence[Run]) -> list[str]:
    """Return what the runs of one report should have in common and do not."""
    lines = []
    for attack in dict.fromkeys(name for run in runs for name in run.evaluations):
        records = [run.evaluations[attack].record for run in runs if attack in run.evaluations]
        differing = [
            title.lower()
            for key, title in SETTINGS.items()
            if key not in ("dataset", "seed")  # said above; another seed is the same attack
            and len({json.dumps(record.get(key)) for record in records}) > 1
        ]
        if differing:
            lines.append(
                f"{attack_name(attack)} was not run alike on all runs (differing: "
                f"{_join(differing)}): see the attack settings before comparing."
            )
    if len({json.dumps(run.env.get("hardware"), sort_keys=True) for run in runs}) > 1:
        lines.append("The runs used different hardware: their training times do not compare.")
    return lines


def _incomparable(runs: Sequence[Run]) -> list[str]:
    """Why the runs have no order."""
    return [
        f"The runs have different {title}, {_join(sorted(values))}: "
        "their accuracies do not compare."
        for title, values in (
            ("data sets", _data_sets(runs)),
            ("threat models", {threat_name(run) for run in runs}),
        )
        if len(values) > 1
    ]


def _data_sets(runs: Sequence[Run]) -> list[str]:
    """Return the names; of one that stands for several (folders of images) the sizes, too."""
    names: dict[str, dict[str, str]] = {}
    for run in runs:
        kinds = names.setdefault(run.config["data"]["name"], {})
        if recorded := run.env.get("dataset"):
            kinds[data_set(recorded)] = (
                f"{recorded['name']} ({len(recorded.get('classes', []))} classes, "
                f"{recorded.get('test', 0):,} test images)"
            )
    return [
        said
        for name, kinds in names.items()
        for said in (kinds.values() if len(kinds) > 1 else [name])
    ]


def _join(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
