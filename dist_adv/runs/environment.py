"""What a figure must be read with: versions, commit, hardware, ranks."""

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dist_adv import __version__, packages


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, commit, hardware, ranks: what a figure must be read with."""
    gpu = accelerator.device.type == "cuda"
    recorded = ("torch", "torchvision", "accelerate", "wandb", "numpy")
    return {
        "python": platform.python_version(),
        "dist_adv": __version__,
        **{name: packages.version(name) for name in recorded},
        "git_commit": git_commit(),
        "platform": platform.platform(),
        "hardware": {
            "device": accelerator.device.type,
            "name": torch.cuda.get_device_name() if gpu else cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "world_size": accelerator.num_processes,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """Return what the CPU calls itself, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def code_version() -> str:
    """Return the version and a hash of the sources that run: a commit tells no changes."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + source.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:12]})"


def checkout() -> Path | None:
    """Return the git repository that has this code in it, None where it was installed.

    An installed package may lie in somebody's repository all the same, in a virtual environment
    that git ignores: then this very file is none of git's.
    """
    here = Path(__file__).resolve()
    if not _git(here.parent, "ls-files", "--error-unmatch", here.name):
        return None
    root = _git(here.parent, "rev-parse", "--show-toplevel")
    return Path(root) if root else None


def git_commit() -> str | None:
    """Return the commit of this code, with `-dirty` where it was changed; None outside of git."""
    root = checkout()
    if root is None:
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints in `folder`; None where it is absent, refuses or prints nothing."""
    # In a git hook GIT_DIR names the repository of the hook. Where this code's own checkout belongs
    # to another user, as in containers, that code is running already; of any other repository git
    # would run what its settings name (core.fsmonitor).
    own = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    try:
        found = subprocess.run(
            ["git", "-c", f"safe.directory={own}", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
