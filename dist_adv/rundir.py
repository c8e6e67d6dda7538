"""The folder of a run: created once, never overwritten, recognised when a run goes on."""

import hashlib
import json
import logging
import os
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from dist_adv import __version__, files, packages
from dist_adv.config import Config, differences, load_config, longer, training_differences
from dist_adv.errors import UserError
from dist_adv.lock import Lock, unusable
from dist_adv.models import read_final
from dist_adv.reading import weights_of_shorter_run

log = logging.getLogger("dist_adv")


def check(run_dir: Path, config: Config, resume: bool) -> Lock | None:
    """Is this a place for this experiment: absent, empty, or a run of it? Locks what exists.

    Raises UserError for a folder that belongs to something else, that another process is using,
    or that exists although the caller wants a new one.
    """
    return Lock(run_dir) if holds(run_dir, config, resume) else None


def holds(run_dir: Path, config: Config, resume: bool = True) -> bool:
    """Is there a run of this experiment, rather than nothing? Raises UserError as `check` does."""
    saved = run_dir / "config.yaml"
    try:
        content = list(run_dir.iterdir()) if run_dir.exists() else []
        is_run = saved.is_file()
    except OSError as error:
        raise unusable(run_dir, error) from None
    if not content:
        return False
    if not is_run:
        raise UserError(f"{run_dir}: is not empty and no run folder; choose another --run-dir")
    if not resume:
        raise UserError(
            f"{run_dir}: exists already; choose another --run-dir, or --resume auto to go on"
        )
    check_same_experiment(load_config(saved), config, run_dir)
    return True


def trained(run_dir: Path, config: Config) -> bool:
    """Has the run of this folder ended, and is no longer one wanted?"""
    return (run_dir / "model.safetensors").exists() and not longer(config_of(run_dir), config)


def config_of(run_dir: Path) -> Config:
    return load_config(run_dir / "config.yaml")


def check_writable(run_dir: Path) -> None:
    """Raise UserError where results could not be added to those of a run."""
    results = run_dir / "results.jsonl"
    try:
        tempfile.TemporaryFile(dir=run_dir).close()
        if results.exists():
            results.open("r+b").close()
    except OSError as error:
        raise UserError(
            f"{run_dir}: results cannot be written there ({error.strerror}); copy the folder, and "
            "evaluate the copy"
        ) from None


def create(run_dir: Path, config: Config, accelerator: Accelerator, about: dict[str, Any]) -> Lock:
    """Make a new folder with config.yaml and env.json, and lock it.

    Raises UserError where it cannot be made, or another process has made it meanwhile.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = Lock(run_dir)
        if (run_dir / "config.yaml").exists():
            lock.release()
            raise UserError(f"{run_dir}: has just become another run; run the command again")
    except OSError as error:
        raise unusable(run_dir, error) from None
    files.replace(run_dir / "config.yaml", config.dump().encode())
    _write_environment(run_dir, accelerator, about)
    return lock


def go_on(run_dir: Path, config: Config, accelerator: Accelerator, about: dict[str, Any]) -> None:
    """A run that goes on gets a new env.json, and its configuration what has changed, aloud."""
    saved, weights = run_dir / "config.yaml", run_dir / "model.safetensors"
    if weights.exists():  # of the shorter run that this one was
        step = read_final(weights)["trained"]["step"]
        kept = weights.rename(weights_of_shorter_run(run_dir, step))
        log.info("%s: the weights of the shorter run are kept as %s", run_dir, kept.name)
    for line in differences(config_of(run_dir), config):
        log.info("config.yaml: %s", line)
    files.replace(saved, config.dump().encode())
    _write_environment(run_dir, accelerator, about)


State = Literal["running", "preempted", "failed", "done"]


def mark(run_dir: Path, state: State, **about: Any) -> None:
    """Write status.json: what became of the run. `running` without a lock: it was killed."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"state": state, **about, "time": now})
    files.replace(run_dir / "status.json", line.encode())


def state_of(run_dir: Path) -> State | None:
    """What status.json says; None where it says nothing."""
    try:
        return json.loads((run_dir / "status.json").read_text())["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_environment(run_dir: Path, accelerator: Accelerator, about: dict[str, Any]) -> None:
    text = json.dumps(_environment(accelerator) | about, indent=1)
    files.replace(run_dir / "env.json", text.encode())


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
    recorded = ("torch", "torchvision", "accelerate", "wandb", "numpy")
    return {
        "python": platform.python_version(),
        "dist_adv": __version__,
        **{name: packages.version(name) for name in recorded},
        "git_commit": git_commit(),
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


def code_version() -> str:
    """The version, and a hash of the sources that run: a commit would not tell what is changed."""
    package = Path(__file__).parent
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
    own = Path(__file__).resolve().parents[1]
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
