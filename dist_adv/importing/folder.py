"""The folder of an imported network: weights, config.json, and a README that says where from."""

import json
from pathlib import Path
from typing import Any

from dist_adv.data import Dataset
from dist_adv.evaluation.results import Result, wilson
from dist_adv.importing.choice import Choice
from dist_adv.models import save_model
from dist_adv.text import shown


def fill(
    folder: Path, choice: Choice, data: Dataset, natural: Result, expected: float | None
) -> None:
    """Write model.safetensors, config.json and README.md.

    natural: the clean accuracy as measured; expected: in percent, where one was.

    Raises RunFailure or OSError where the disk refuses.
    """
    model = choice.build(data.classes)
    architecture = model.architecture | {"imported": _origin(choice, data, natural, expected)}
    save_model(folder / "model.safetensors", architecture, model.state_dict())
    (folder / "config.json").write_text(json.dumps(architecture, indent=1))
    (folder / "README.md").write_text(_readme(choice, architecture), encoding="utf-8")


def _origin(
    choice: Choice, data: Dataset, natural: Result, expected: float | None
) -> dict[str, Any]:
    return {
        "file": shown(choice.file.name),
        "sha256": choice.foreign.sha256,
        "format": choice.foreign.format,
        "notes": choice.foreign.notes,
        "assumed": choice.assumed,
        "natural": {
            "data": data.name,
            "accuracy": natural.accuracy,
            "correct": natural.correct,
            "n": natural.n,
            "ci95": wilson(natural.correct, natural.n),
            "expected": None if expected is None else expected / 100,
        },
    }


def _readme(choice: Choice, architecture: dict[str, Any]) -> str:
    origin = architecture["imported"]
    natural = origin["natural"]
    low, high = natural["ci95"]
    expected = natural["expected"]
    proof = (
        f"Nothing proves {choice.assumed or 'that it is this network'}: no accuracy was expected."
        if expected is None
        else f"{expected:.2%} was expected, which is in the interval."
    )
    network = ", ".join(f"{key}: {value}" for key, value in choice.options.items())
    norm = choice.normalisation
    where = "in the file" if norm.in_file else f"--normalise {norm}"
    notes = "".join(f"{note} " for note in origin["notes"])
    return f"""# {choice.options["name"]}, imported

Somebody else has trained it. What is in the file was not executed, only read.

| | |
|---|---|
| file | `{origin["file"]}` |
| SHA-256 | `{origin["sha256"]}` |
| format | {origin["format"]} |
| network | {network} |
| normalisation | mean {_listed(norm.mean)}, standard deviation {_listed(norm.std)} ({where}) |
| clean accuracy | {natural["accuracy"]:.2%}, 95 % interval {low:.2%} to {high:.2%} |
| measured on | {natural["n"]:,} test images of {natural["data"]} |

{notes}{proof}

```python
import dist_adv
model = dist_adv.load_model("path/to/this/folder")   # images in [0, 1], NCHW -> logits
```
"""


def _listed(values: list[float]) -> str:
    return ", ".join(f"{each:.4g}" for each in values)
