"""The folder of a run: created once, never overwritten, recognised when a run goes on."""

import json
import logging
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from dist_adv import files
from dist_adv.config import Config, differences, load_config, longer, training_differences
from dist_adv.errors import UserError
from dist_adv.models import read_final
from dist_adv.runs.environment import environment
from dist_adv.runs.lock import Lock, unusable
from dist_adv.runs.reading import weights_of_shorter_run

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
    text = json.dumps(environment(accelerator) | about, indent=1)
    files.replace(run_dir / "env.json", text.encode())


def check_same_experiment(old: Config, new: Config, where: Path) -> None:
    """Raises UserError listing what differs in anything that changes training."""
    differences = training_differences(old, new)
    if differences:
        raise UserError(
            f"{where}: holds a run with another configuration ({'; '.join(differences)}); "
            f"choose another --run-dir, or go on with its own config.yaml"
        )
