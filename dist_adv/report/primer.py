"""What a reader who is new to adversarial training must know before the numbers."""

import json
from collections.abc import Sequence

from dist_adv.files import Record
from dist_adv.report.gap import AUTOATTACK
from dist_adv.report.tables import Cell, Column, Table, method_title, threat_name
from dist_adv.runs.run import Run
from dist_adv.text import shown

_SPLITS = (("train", "training"), ("test", "test"))
_CLASSES_NAMED = 3


def explanation(runs: Sequence[Run]) -> list[str]:
    """Return the terms, and what the images are."""
    threats = " or ".join(sorted({threat_name(run) for run in runs}))
    return [
        "An adversarial image is an image changed so little that people hardly notice (here within "
        f"{threats}) and in such a way that the model errs. PGD-K searches for the change in K "
        "steps along the loss's gradient, FGSM in one: the more steps, the stronger the attack. "
        "The accuracy that a model keeps under an attack is its robust accuracy. Adversarial "
        "training pays for it with passes through the network, and the methods differ in how many.",
        *_autoattack(runs),
        *_data_sets(runs),
    ]


def _autoattack(runs: Sequence[Run]) -> list[str]:
    records = {name: each.record for run in runs for name, each in run.evaluations.items()}
    said = []
    if AUTOATTACK in records:
        said.append(
            "AutoAttack tries four attacks, one of them without gradients, and counts an image as "
            "kept where all of them fail; its figure is the one that publications compare. It "
            "usually lies a few points below that of PGD-50. Where it lies far below, the gradient "
            "of the loss has misled PGD, whose figure then says little about how robust the model "
            "is."
        )
        if records[AUTOATTACK].get("version") == "custom":
            said.append(
                "Here it is not its standard version: with fewer than ten classes it has fewer to "
                "steer towards, and with fewer than four it is without APGD-T."
            )
    if "apgd-t" in records:
        targets = records["apgd-t"].get("target_classes", 9)
        said.append(
            f"APGD-T is the strongest of AutoAttack's four by itself: it steers towards {targets} "
            "other classes, one after another, and halves its steps where it stalls. AutoAttack "
            "usually finds little more."
        )
    return said


def methods(runs: Sequence[Run]) -> Table:
    """Return the methods of the runs that recorded theirs, the cheapest first, and the cost."""
    alike: dict[str, list[Run]] = {}
    known = [run for run in runs if run.batch_cost]
    for run in sorted(known, key=lambda run: run.batch_cost):
        alike.setdefault(method_title(run), []).append(run)
    rows = []
    for title, group in alike.items():
        steps = dict.fromkeys(str(run.env["method"]["steps"]) for run in group)
        costs = dict.fromkeys(f"{run.batch_cost:.3g}" for run in group)
        about = group[-1].env["method"].get("about", "")
        rows.append([Cell(title), Cell(about), Cell(", ".join(steps)), Cell(", ".join(costs))])
    return Table(
        "The methods",
        "Passes through the network, forward and back, are nearly all of the time that a batch "
        "takes, so their number is what an epoch costs: natural training's three are 1 here. At "
        "the same number of epochs, Free takes m times as many optimiser steps as the others.",
        [
            Column("Method"),
            Column("Trains"),
            Column("Optimiser steps a batch", numeric=True),
            Column("Cost of a batch", numeric=True),
        ],
        rows,
    )


def _data_sets(runs: Sequence[Run]) -> list[str]:
    """Each data set as far as the runs recorded it: a folder's name may say nothing."""
    sentences: dict[str, str] = {}
    for run in sorted(runs, key=lambda run: run.examples is None):
        recorded = run.env.get("dataset", {})
        name = recorded.get("name", run.config["data"]["name"])
        parts = [f"{recorded[key]:,} {what} images" for key, what in _SPLITS if key in recorded]
        if run.examples:
            height, width = run.examples.clean.shape[2:]
            parts.append(f"{height} x {width} pixels")
        if classes := recorded.get("classes"):
            some = [
                *map(shown, classes[:_CLASSES_NAMED]),
                *(["..."] if len(classes) > _CLASSES_NAMED else []),
            ]
            parts.append(f"{len(classes)} classes ({', '.join(some)})")
        sentences.setdefault(
            data_set({"name": name, **recorded}), f"Data: {', '.join([name, *parts])}."
        )
    return list(sentences.values())


def data_set(recorded: Record) -> str:
    """Return what tells one data set from another of its name: folders of images have one name."""
    return json.dumps([recorded.get(key) for key in ("name", "classes", "test")])
