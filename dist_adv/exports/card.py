"""Model cards: what a model is, its robust accuracy, and the metadata that the Hub reads."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from dist_adv.exports.finished import Asked, Finished
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
# What data sets are called on the Hub.
_ON_THE_HUB = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
}


def write(run: Finished, asked: Asked, folder: Path) -> str:
    """Write model.safetensors, config.json and README.md with the Hub's metadata."""
    shutil.copy(run.folder.weights, folder / "model.safetensors")
    where = f"hf:{asked.repository}" if asked.repository else "path/to/this/folder"
    usage = f"""import dist_adv
model = dist_adv.load_model("{where}")   # images in [0, 1], NCHW -> logits"""
    write_about(run, usage, folder, metadata(run, asked.license))
    return ""


def write_about(run: Finished, usage: str, folder: Path, data: ModelCardData | None = None) -> None:
    """Write config.json, and a model card with lines of Python that use the model."""
    (folder / "config.json").write_text(json.dumps(run.architecture, indent=1))
    front = f"---\n{data}\n---\n" if data else ""
    (folder / "README.md").write_text(front + _card(run, usage), encoding="utf-8")


def metadata(run: Finished, license: str | None) -> ModelCardData:
    """Return what the Hub reads of a model card: tags, data sets, and a result for each attack."""
    dataset = run.architecture["trained"]["data"]
    attacks = [figure.attack for figure in run.figures.values() if figure.attack != "natural"]
    results = [_result(figure, dataset) for figure in run.figures.values()]
    return ModelCardData(
        license=license,
        library_name="dist-adv",
        pipeline_tag="image-classification",
        tags=["adversarial-robustness", run.architecture["threat"]["norm"], *attacks],
        datasets=[_ON_THE_HUB[dataset]] if dataset in _ON_THE_HUB else None,
        metrics=["accuracy"],
        model_name=run.title if results else None,
        eval_results=results or None,
    )


def _result(figure: Evaluation, dataset: str) -> EvalResult:
    robust = figure.attack != "natural"
    return EvalResult(
        task_type="image-classification",
        dataset_type=_ON_THE_HUB.get(dataset, dataset),
        dataset_name=dataset,
        dataset_split=figure.record.get("split"),
        metric_type="accuracy",
        metric_name=f"robust accuracy ({figure.attack})" if robust else "accuracy",
        metric_value=figure.accuracy,
        metric_args={"n": figure.n}
        | {key: figure.record[key] for key in _SETTINGS if figure.record.get(key) is not None},
    )


def _card(run: Finished, usage: str) -> str:
    trained, threat = run.architecture["trained"], run.architecture["threat"]
    figures = list(run.figures.values())
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows(figures))
    warnings = [f"- {figure.attack}: {flag}" for figure in figures for flag in figure.flags]
    return f"""# {run.title}

Threat: {threat["norm"]}, radius {threat["eps"]:.6g} in pixel units of [0, 1].
Trained for {trained["epoch"]:g} epochs ({trained["step"]} optimiser steps).

{table if figures else "Not evaluated."}

Attacks on test images in eval mode and fp32, worst case over restarts and iterates.
{"".join(f"{line}{chr(10)}" for line in ["", *warnings] if warnings)}
```python
{usage}
```
"""


def rows(figures: Sequence[Evaluation]) -> Iterator[list[str]]:
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
