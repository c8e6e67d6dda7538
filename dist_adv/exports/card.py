"""A trained model as a folder to hand on: weights, config.json and a model card."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_adv.errors import unwritable
from dist_adv.models import read_final
from dist_adv.runs import reading
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.reading import Evaluation

# How an attack was run: keys of results.jsonl and titles in the card.
_SETTINGS = {
    "norm": "norm",
    "eps": "radius",
    "steps": "steps",
    "step_size": "step size",
    "restarts": "restarts",
    "init": "start",
    "loss_fn": "loss",
}


def export_run(run_dir: Path, out: Path) -> None:
    """Write model.safetensors, config.json and README.md to the new folder `out`, or nothing.

    Raises UserError where the run has no final weights, or `out` exists; RunFailure where the disk
    refuses.
    """
    weights = RunFolder(run_dir).weights
    architecture = read_final(weights)
    card = _card(architecture, run_dir)
    partial = out.with_name(f".partial-{out.name}") if out.name else out
    try:
        if out.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        shutil.copy(weights, partial / "model.safetensors")
        (partial / "config.json").write_text(json.dumps(architecture, indent=1))
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(out)
    except OSError as error:
        if partial != out:
            shutil.rmtree(partial, ignore_errors=True)
        raise unwritable(out, error, "choose a new folder") from None


def _card(architecture: dict, run_dir: Path) -> str:
    trained, threat, model = (architecture[key] for key in ("trained", "threat", "model"))
    figures = reading.read_results(run_dir, threat, trained["data"]).figures.values()
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in _rows(list(figures)))
    warnings = [f"- {figure.attack}: {flag}" for figure in figures for flag in figure.flags]
    return f"""# {model["name"]}, {trained["method"]} training on {trained["data"]}

Threat: {threat["norm"]}, radius {threat["eps"]:.6g} in pixel units of [0, 1].
Trained for {trained["epoch"]:g} epochs ({trained["step"]} optimiser steps).

{table if figures else "Not evaluated."}

Attacks on test images in eval mode and fp32, worst case over restarts and iterates.
{"".join(f"{line}{chr(10)}" for line in ["", *warnings] if warnings)}
```python
import dist_adv
model = dist_adv.load_model("path/to/this/folder")   # images in [0, 1], NCHW -> logits
```
"""


def _rows(figures: Sequence[Evaluation]) -> Iterator[list[str]]:
    """Yield the cells of a table: its titles, the rule below them, and an attack a row."""
    settings = [key for key in _SETTINGS if any(key in figure.record for figure in figures)]
    titles = [
        "attack",
        "accuracy",
        "95 % interval",
        "images",
        *map(_SETTINGS.__getitem__, settings),
    ]
    yield titles
    yield ["---"] * len(titles)
    for figure in figures:
        low, high = figure.interval
        yield [
            figure.attack,
            f"{figure.accuracy:.2%}",
            f"{low:.2%} to {high:.2%}",
            str(figure.n),
            *(_setting(figure.record.get(key)) for key in settings),
        ]


def _setting(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
