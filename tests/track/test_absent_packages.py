"""A run needs what it uses, and imports no more.

Absence is not pretended: the interpreter is given a folder of links to what is installed here but
for some packages, so neither their modules nor their metadata are there.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import dist_adv

pytestmark = pytest.mark.slow

# As the names of modules and of metadata begin. torch and accelerate look for some of them.
ABSENT = (
    *("wandb", "matplotlib", "mpl_", "sklearn", "scikit", "scipy", "pandas", "joblib", "art"),
    *(
        "datasets",
        "pyarrow",
        "aiohttp",
        "adversarial_robustness",
        "deepspeed",
        "tensorboard",
        "pyautoattack",
        "foolbox",
        "__edit",
    ),
)
# Ends with a line of the statuses, and of what was imported by training and evaluation.
TRAIN = """
import json, sys
from dist_adv.cli import _run
small = "train.max_steps=2 train.batch_size=30 train.precision=fp32 model.width=2".split()
def train(config, *more):
    return _run(["train", config, *small, *more])
statuses = [train("imagefolder.yaml", "--run-dir", "run"), _run(["eval", "run"])]
imported = sorted(sys.modules)
"""
ASK = """
new = ["--run-dir", "new"]
statuses += [
    train("digits.yaml", *new),
    train("imagefolder.yaml", "track.wandb.mode=offline", *new),
    train("imagefolder.yaml", "track.tensorboard=true", *new),
    _run(["report", "run", "--out", "new"]),
    _run(["sync", "run"]),
    _run(["dashboard", "--out", "new"]),
    _run(["demo", "--out", "new"]),
    _run(["doctor", "imagefolder.yaml"]),
    train("imagefolder.yaml", "track.wandb.mode=auto", "--run-dir", "auto"),
]
"""
SAY = "print(json.dumps([statuses, imported]))"
COMPLAINTS = [
    "data.name: digits: sklearn is not installed; pip install scikit-learn",
    "track.wandb.mode: wandb is not installed; pip install wandb, or set it to disabled",
    "track.tensorboard: tensorboard is not installed; pip install 'dist-adv[tensorboard]'",
    "report: matplotlib is not installed; pip install matplotlib",
    "sync: wandb is not installed; pip install wandb",
    "dashboard: wandb-workspaces is not installed; pip install 'dist-adv[dashboard]'",
    "demo: matplotlib is not installed; pip install matplotlib",
]


def run(
    program: str, folder: Path, images: Path, packages: Path
) -> tuple[list[int], list[str], str]:
    """Statuses, modules and standard error of a fresh interpreter that has these packages."""
    for name in ("imagefolder", "digits"):
        tree = {
            "method": {"name": "fast"},
            "model": {"name": "preact_resnet18"},
            "data": {"name": name, "root": str(images)},
            "eval": {"attacks": ["natural", "pgd-2"]},
            "track": {"wandb": {"mode": "disabled"}},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(tree))
    code = Path(dist_adv.__file__).parents[1]
    clean = {name: value for name, value in os.environ.items() if name[:6] != "WANDB_"}
    path = {"PYTHONPATH": f"{code}{os.pathsep}{packages}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],  # -S: no site-packages but these
        cwd=folder,
        env=clean | path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    statuses, imported = json.loads(done.stdout.splitlines()[-1])
    return statuses, imported, done.stderr


def test_packages_that_are_absent(images: Path, tmp_path: Path) -> None:
    """Who does not ask for one does without; who does is told the remedy before anything starts."""
    packages, folder = tmp_path / "packages", tmp_path / "work"
    packages.mkdir()
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.lower().startswith(ABSENT):
            (packages / path.name).symlink_to(path)
    statuses, _, said = run(TRAIN + ASK + SAY, folder, images, packages)
    lines = [line for line in said.splitlines() if line.startswith("dist-adv: ")]
    assert [line.removeprefix("dist-adv: ") for line in lines] == COMPLAINTS
    assert statuses == [0, 0, *[2] * len(COMPLAINTS), 0, 0]
    env = json.loads((folder / "run" / "env.json").read_text())
    assert (env["wandb"], env["torch"] is None) == (None, False)
    assert not (folder / "new").exists()
    assert "no W&B (No module named 'wandb'); metrics.jsonl is the record" in said


def test_packages_that_are_not_used(images: Path, tmp_path: Path) -> None:
    """Installed here, and not imported: no start waits for them, nor fails by them."""
    packages = Path(sysconfig.get_path("purelib"))
    statuses, imported, _ = run(TRAIN + SAY, tmp_path, images, packages)
    assert statuses == [0, 0]
    assert "torch" in imported
    assert [name for name in imported if name.startswith(ABSENT)] == []
