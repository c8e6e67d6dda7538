"""A trained model as a folder to hand on: weights, config.json and a model card."""

import json
import shutil
from pathlib import Path

from dist_adv import records
from dist_adv.errors import UserError
from dist_adv.models import read_final


def export_run(run_dir: Path, out: Path) -> None:
    """Write model.safetensors, config.json and README.md to the new folder `out`.

    Raises UserError where the run has no final weights, or `out` exists.
    """
    weights = run_dir / "model.safetensors"
    architecture = read_final(weights)
    card = _card(architecture, run_dir)
    try:
        out.mkdir(parents=True)
        shutil.copy(weights, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps(architecture, indent=1))
        (out / "README.md").write_text(card)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{out}: cannot be written ({reason}); choose a new folder") from None


def _card(architecture: dict, run_dir: Path) -> str:
    trained, threat, model = (architecture[key] for key in ("trained", "threat", "model"))
    results = run_dir / "results.jsonl"
    latest = {}
    for number, record in records.read(results):
        records.require(record, ("attack", "accuracy", "ci95", "n"), results, number)
        latest[record["attack"]] = record
    rows = [
        f"| {name} | {r['accuracy']:.2%} | {r['ci95'][0]:.2%} to {r['ci95'][1]:.2%} | {r['n']} |"
        for name, r in latest.items()
    ]
    table = "\n".join(
        ["| attack | accuracy | 95 % interval | images |", "|---|---|---|---|", *rows]
    )
    return f"""# {model["name"]}, {trained["method"]} training on {trained["data"]}

Threat: {threat["norm"]}, radius {threat["eps"]:.6g} in pixel units of [0, 1].
Trained for {trained["epoch"]:g} passes over the data ({trained["step"]} optimiser steps).

{table if rows else "Not evaluated."}

Attacks in eval mode and fp32, worst case over restarts and iterates, step size a quarter of the
radius unless the results of the run say otherwise.

```python
import dist_adv
model = dist_adv.load_model("path/to/this/folder")   # images in [0, 1], NCHW -> logits
```
"""
