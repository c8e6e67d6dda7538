"""The folder of a run: created once, never overwritten, recognised when a run goes on."""

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dist_adv import __version__
from dist_adv.config import Config, load_config, training_differences
from dist_adv.errors import UserError


def check(run_dir: Path, config: Config, resume: bool) -> None:
    """Is this a place for this experiment: absent, empty, or a run of it? Writes nothing.

    Raises UserError for a folder that belongs to something else, or that exists although the
    caller wants a new one.
    """
    saved = run_dir / "config.yaml"
    try:
        content = list(run_dir.iterdir()) if run_dir.exists() else []
    except OSError as error:
        raise _unusable(run_dir, error) from None
    if content and not saved.is_file():
        raise UserError(f"{run_dir}: is not empty and no run folder; choose another --run-dir")
    if content and not resume:
        raise UserError(
            f"{run_dir}: exists already; choose another --run-dir, or --resume auto to go on"
        )
    if content:
        check_same_experiment(load_config(saved), config, run_dir)


def create(run_dir: Path, config: Config, accelerator: Accelerator, about: dict[str, Any]) -> None:
    """Make the folder with config.yaml and env.json; a run that goes on gets a new env.json."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "config.yaml").exists():
            (run_dir / "config.yaml").write_text(config.dump())
        environment = json.dumps(_environment(accelerator) | about, indent=1)
        (run_dir / "env.json").write_text(environment)
    except OSError as error:
        raise _unusable(run_dir, error) from None


def _unusable(run_dir: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"{run_dir}: cannot be a run folder ({reason}); choose another --run-dir")


def check_same_experiment(old: Config, new: Config, where: Path) -> None:
    """Raises UserError listing what differs in anything that changes training."""
    differences = training_differences(old, new)
    if differences:
        raise UserError(
            f"{where}: holds a run with another configuration ({'; '.join(differences)}); "
            f"choose another --run-dir, or go on with its own config.yaml"
        )


def _environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, commit, hardware, ranks: what a figure must be read with."""
    gpu = accelerator.device.type == "cuda"
    packages = ("torch", "torchvision", "accelerate", "wandb", "numpy")
    return {
        "python": platform.python_version(),
        "dist_adv": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "hardware": {
            "device": accelerator.device.type,
            "name": torch.cuda.get_device_name() if gpu else _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "world_size": accelerator.num_processes,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    """The commit of this source tree, with `-dirty` where it was changed; None outside of one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
