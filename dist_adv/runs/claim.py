"""Whose a folder is: nobody's, this experiment's or another's; and how it becomes ours."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dist_adv import files
from dist_adv.config import Config, differences, load_config, longer, training_differences
from dist_adv.errors import UserError
from dist_adv.models import read_final, weights_file
from dist_adv.runs import reading
from dist_adv.runs.environment import environment
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.lock import Lock, unusable

log = logging.getLogger("dist_adv")


def take(run: RunFolder, config: Config, resume: bool) -> Lock | None:
    """Lock the folder of this experiment; return None where there is nothing yet.

    Raises UserError for a folder that belongs to something else, that another process is using,
    or that exists although the caller wants a new one.
    """
    return run.lock() if holds(run, config, resume) else None


def holds(run: RunFolder, config: Config, resume: bool = True) -> bool:
    """Tell whether there is a run of this experiment. Raises UserError as `take` does."""
    try:
        # A lock and half a file are left of a start that the disk, or a kill, ended.
        inside = run.path.iterdir() if run.path.exists() else []
        content = [path for path in inside if not path.name.startswith(".")]
        is_run = run.config.is_file()
    except OSError as error:
        raise unusable(run.path, error) from None
    if not content:
        return False
    if not is_run:
        raise UserError(f"{run}: is not empty and no run folder; choose another --run-dir")
    if not resume:
        raise UserError(
            f"{run}: exists already; choose another --run-dir, or --resume auto to go on"
        )
    check_same_experiment(load_config(run.config), config, run.path)
    if run.environment.exists():
        check_same_start(reading.read_environment(run.path).get("start"), config, run.path)
    return True


def trained(run: RunFolder, config: Config) -> bool:
    """Tell whether training is over and no longer run is wanted."""
    return run.weights.exists() and not longer(load_config(run.config), config)


def check_writable(run: RunFolder) -> None:
    """Raise UserError where results could not be added to those of a run."""
    try:
        tempfile.TemporaryFile(dir=run.path).close()
        if run.results.exists():
            run.results.open("r+b").close()
    except OSError as error:
        raise UserError(
            f"{run}: results cannot be written there ({error.strerror}); copy the folder, and "
            "evaluate the copy"
        ) from None


def create(run: RunFolder, config: Config, accelerator: Accelerator, about: dict[str, Any]) -> Lock:
    """Make a new folder with config.yaml and env.json, and lock it.

    Raises UserError where it cannot be made, or another process has made it meanwhile.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = run.lock()
        if run.config.exists():
            lock.release()
            raise UserError(f"{run}: has just become another run; run the command again")
    except OSError as error:
        raise unusable(run.path, error) from None
    _describe(run, config, accelerator, about)
    return lock


def go_on(run: RunFolder, config: Config, accelerator: Accelerator, about: dict[str, Any]) -> None:
    """Write a new env.json, and the configuration with what has changed, aloud."""
    if run.weights.exists():  # of the shorter run that this one was
        step = read_final(run.weights)["trained"]["step"]
        kept = run.weights.rename(run.weights_of_shorter_run(step))
        log.info("%s: the weights of the shorter run are kept as %s", run, kept.name)
    for line in differences(load_config(run.config), config):
        log.info("config.yaml: %s", line)
    _describe(run, config, accelerator, about)


def _describe(
    run: RunFolder, config: Config, accelerator: Accelerator, about: dict[str, Any]
) -> None:
    files.replace(run.config, config.dump().encode())
    text = json.dumps(environment(accelerator) | about, indent=1)
    files.replace(run.environment, text.encode())


def check_same_experiment(old: Config, new: Config, where: Path) -> None:
    """Raise UserError listing what differs in anything that changes training."""
    differences = training_differences(old, new)
    if differences:
        raise UserError(
            f"{where}: holds a run with another configuration ({'; '.join(differences)}); "
            f"choose another --run-dir, or go on with its own config.yaml"
        )


def check_same_start(before: str | None, config: Config, where: Path) -> None:
    """Raise UserError where `train.start` has other weights than those that a run began with.

    before: their SHA-256. Of a file that is gone nothing is known: a finished run does without.
    """
    start = config.train.start
    now = None if start is None else files.sha256(weights_file(start))
    if before != now and (start is None or now is not None):
        told = [f"SHA-256 {each[:12]}" if each else "fresh ones" for each in (before, now)]
        raise UserError(
            f"{where}: began with other weights ({told[0]}) than train.start has now ({told[1]}); "
            f"restore them, or choose another --run-dir"
        )
