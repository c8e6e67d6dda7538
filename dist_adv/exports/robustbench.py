"""A model in the form that RobustBench takes (Croce et al. 2021): weights, entry, figures, claim.

Written for robustbench 1.1.1. Its networks are of fixed widths and take colour images of 32x32
pixels, over whose last maps of 4x4 or 8x8 they average.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_adv.errors import RunFailure, UserError
from dist_adv.exports.finished import Asked, Finished
from dist_adv.models import Classifier
from dist_adv.models.foreign_keys import public_keys
from dist_adv.runs.reading import Evaluation
from dist_adv.text import one_line, pixels

_NEEDED = ("natural", "autoattack")
_IMAGE = (3, 32, 32)
_DATASETS = ("cifar10", "cifar100")
_TEST_IMAGES = 10_000
_NORMS = {"linf": "Linf", "l2": "L2"}
_RANKED = {"Linf": "8/255", "L2": "0.5"}

_ENTRY = '''"""{name} as an entry of RobustBench's model zoo."""

import torch
from robustbench.model_zoo.architectures.{module} import {imports}


class {name}Net({base}):
    def __init__(self):
        super().__init__({arguments})
        self.register_buffer("mu", torch.tensor({mu}).view(1, 3, 1, 1))
        self.register_buffer("sigma", torch.tensor({sigma}).view(1, 3, 1, 1))

    def forward(self, x):
        return super().forward((x - self.mu) / self.sigma)


# gdrive_id: of {name}.pt on Google Drive.
ENTRY = ("{name}", {{"model": {name}Net, "gdrive_id": None}})
'''

_CLAIM = """{notes}# Paper Information

- **Paper Title**:
- **Paper URL**:
- **Paper authors**:

# Leaderboard Claim(s)

## Model 1

- **Architecture**: {architecture}
- **Dataset**: {dataset}
- **Threat Model**: {norm}
- **eps**: {eps}
- **Clean accuracy**: {clean_acc} % ({clean_n:,} test images)
- **Robust accuracy**: {autoattack_acc} % ({robust_n:,} test images)
- **Additional data**: {more_data}
- **Evaluation method**: AutoAttack, {version} ({attacks}), in dist_adv's code
- **Checkpoint and code**: (the URLs of {name}.pt and entry.py)

# Model Zoo:

- [ ] I want to add my models to the Model Zoo (check if true)
- [x] I use an architecture that is included among those of RobustBench
- [ ] I agree to release my model(s) under MIT license (check if true) **OR** under a custom
  license, located here: (URL)
"""


def write(run: Finished, asked: Asked, folder: Path) -> str:
    """Write NAME.pt, NAME.json, entry.py and claim.md; return whether their class agrees.

    Raises UserError where the name, the network, its images or its figures are none that
    RobustBench takes; RunFailure where their class gives other logits.
    """
    name = _checked(asked.name)
    arguments = _arguments(run)
    _check_images(run)
    natural, robust = (_figure(run, attack) for attack in _NEEDED)
    model = run.model()
    torch.save(_renamed(run, model), folder / f"{name}.pt")
    about = _about(run, natural, robust)
    (folder / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n")
    mean, std = run.architecture["mean"], run.architecture["std"]
    entry = {"name": name, "mu": mean, "sigma": std, **arguments}
    (folder / "entry.py").write_text(_ENTRY.format(**entry), encoding="utf-8")
    claim = {
        **about,
        "name": name,
        "norm": _NORMS[run.architecture["threat"]["norm"]],
        "clean_n": natural.n,
        "robust_n": robust.n,
        "version": robust.record.get("version"),
        "attacks": ", ".join(robust.record.get("attacks", ())),
        "more_data": str(about["additional_data"]).lower(),
        "notes": "".join(f"{line}\n" for line in _notes(run, natural, robust)),
    }
    (folder / "claim.md").write_text(_CLAIM.format(**claim), encoding="utf-8")
    return _verify(name, folder, model)


def _checked(name: str) -> str:
    if not name.isidentifier():
        raise UserError(
            f"--name: {name!r} cannot name a class; --format robustbench takes one such as "
            f"--name Wong2020Fast, of author, year and the title's first word"
        )
    return name


def _arguments(run: Finished) -> dict[str, str]:
    """Return which of their classes the network is, and what it is made with."""
    options = run.architecture["model"]
    name, classes = options["name"], len(run.architecture["classes"])
    match name:
        case "preact_resnet18":
            allowed: dict[str, Any] = {"width": 64, "norm": "batch"}
            block = "PreActBlock" if options["shortcut"] == "raw" else "PreActBlockV2"
            found = {
                "module": "resnet",
                "imports": f"{block}, PreActResNet",
                "base": "PreActResNet",
                "arguments": f"{block}, [2, 2, 2, 2], num_classes={classes}, "
                f"bn_before_fc={options['final_norm']}",
            }
        case "wide_resnet":
            allowed = {"width": 16, "norm": "batch"}
            if options["depth"] % 6 != 4:
                allowed["depth"] = "6n + 4"
            found = {
                "module": "wide_resnet",
                "imports": "WideResNet",
                "base": "WideResNet",
                "arguments": f"depth={options['depth']}, widen_factor={options['widen']}, "
                f"num_classes={classes}",
            }
        case _:
            raise UserError(
                f"{run.folder}: RobustBench has no class for the network {name}; its own are "
                f"preact_resnet18 and wide_resnet"
            )
    for key, value in allowed.items():
        if options[key] != value:
            raise UserError(
                f"{run.folder}: RobustBench's {found['base']} has {key} {value} and this network "
                f"model.{key} {options[key]}; use --format hub"
            )
    return found


def _check_images(run: Finished) -> None:
    if run.image() != _IMAGE:
        theirs, ours = ("x".join(map(str, shape)) for shape in (_IMAGE, run.image()))
        raise UserError(
            f"{run.folder}: RobustBench's networks take images of {theirs} and this one {ours}; "
            f"use --format hub"
        )


def _figure(run: Finished, attack: str) -> Evaluation:
    if attack not in run.figures:
        raise UserError(
            f"{run.folder}: has no figure of {attack!r}, which a claim needs; "
            f"dist-adv eval {run.folder} --attacks {','.join(_NEEDED)}"
        )
    return run.figures[attack]


def _renamed(run: Finished, model: Classifier) -> dict[str, Tensor]:
    """Return the weights under the names of their class."""
    ours = model.net.state_dict()
    public = public_keys(run.architecture["model"]["name"], ours)
    weights = {public[key]: tensor for key, tensor in ours.items()}
    return {"mu": model.normalize.mean, "sigma": model.normalize.std, **weights}


def _about(run: Finished, natural: Evaluation, robust: Evaluation) -> dict[str, Any]:
    """Return the fields of a file in their model_info; what only the authors know is empty."""
    options, dataset = run.architecture["model"], run.architecture["trained"]["data"]
    wide = options["name"] == "wide_resnet"
    accuracy = f"{100 * robust.accuracy:.2f}"
    return {
        "link": "",
        "name": "",
        "authors": "",
        "additional_data": bool(run.config()["data"].get("extra")),
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": "",
        "architecture": f"WideResNet-{options['depth']}-{options['widen']}"
        if wide
        else "PreActResNet-18",
        "eps": pixels(run.architecture["threat"]["eps"]),
        "clean_acc": f"{100 * natural.accuracy:.2f}",
        "reported": accuracy,
        "autoattack_acc": accuracy,
        "unreliable": False,
    }


def _notes(run: Finished, natural: Evaluation, robust: Evaluation) -> list[str]:
    """Return what keeps the figures from being a claim, a line each."""
    dataset, threat = run.architecture["trained"]["data"], run.architecture["threat"]
    lines = []
    if dataset not in _DATASETS:
        lines.append(f"RobustBench ranks networks on {' and '.join(_DATASETS)}, not on {dataset}.")
    if min(natural.n, robust.n) < _TEST_IMAGES:
        lines.append(
            f"AutoAttack had {robust.n:,} test images and the clean accuracy is of {natural.n:,}; "
            f"RobustBench takes all {_TEST_IMAGES:,}."
        )
    norm, eps = _NORMS[threat["norm"]], pixels(threat["eps"])
    if eps != _RANKED[norm]:
        lines.append(f"RobustBench ranks {norm} at eps {_RANKED[norm]}, not {eps}.")
    if start := run.config()["train"].get("start"):
        lines.append(
            f"It started from {start}: additional data, where those weights have seen any."
        )
    if robust.record.get("version") != "standard":
        lines.append("This was not AutoAttack's standard version.")
    return ["**Not a claim yet:**", *(f"- {line}" for line in lines), ""] if lines else []


def _verify(name: str, folder: Path, model: nn.Module) -> str:
    """Compare with their class, made by entry.py, in single and in double precision."""
    try:
        _, entry = runpy.run_path(str(folder / "entry.py"))["ENTRY"]
    except ImportError as error:
        return (
            f"not verified: RobustBench's class has not been tried on {name}.pt "
            f"({one_line(error)}); install robustbench as docs/sharing.md says, and export again"
        )
    theirs = entry["model"]().eval()
    theirs.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    furthest = []
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        images = torch.rand(5, *_IMAGE, dtype=dtype)
        with torch.inference_mode():
            expected, found = model.to(dtype)(images), theirs.to(dtype)(images)
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:  # NaN neither
            raise RunFailure(
                f"{name}.pt: RobustBench's class gives other logits than the network, by "
                f"{difference:.1e} of the largest in {dtype}; nothing was exported"
            )
        furthest.append(f"{difference:.1e}")
    return (
        f"verified: the logits of RobustBench's class are the network's to {furthest[0]} of the "
        f"largest in single and {furthest[1]} in double precision"
    )
