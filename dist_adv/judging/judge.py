"""Anybody's network under attacks, in a folder of its own."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dist_adv import files, plugins
from dist_adv.config import Judged, Reference, differences, load, parse_yaml
from dist_adv.data import Dataset
from dist_adv.distributed.collectives import (
    check_same_start,
    check_started_alike,
    on_main,
)
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.start import start_accelerator
from dist_adv.errors import UserError, unwritable
from dist_adv.judging.finished_run import evaluate_run
from dist_adv.judging.measurement import Asked, Measurement, Subject, load_test_images
from dist_adv.judging.network import digest_of, load_everywhere
from dist_adv.judging.thorough import measure
from dist_adv.runs import claim, reading
from dist_adv.runs.environment import environment
from dist_adv.runs.folder import RunFolder
from dist_adv.terminal import start_logging

log = logging.getLogger("dist_adv")


def folder_of(model: Reference) -> Path:
    """Return where a network's figures go that were not told: judged/ and what it is called."""
    words = [model.reference, *map(str, model.args.values())]
    return Path("judged", re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("-.")[:100])


def reference(name: str, args: Sequence[str]) -> Reference:
    """Return a network's reference with its arguments, given as `key=value`.

    Raises UserError for what is no argument.
    """
    given = {}
    for each in args:
        key, equals, text = each.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--model-args: {each!r} is no argument; write key=value")
        given[key] = parse_yaml(text, f"--model-args: {key}")
    return Reference(reference=name, args=given)


def judge_folder(folder: Path, asked: Asked) -> None:
    """Measure more of what a folder is of: a run, or somebody's network.

    Raises UserError as `judge` and `evaluate_run` do.
    """
    if RunFolder(folder).judged.is_file():
        judge(RunFolder(folder), None, asked)
    else:
        evaluate_run(folder, asked)


def judge(folder: RunFolder, model: Reference | None, asked: Asked) -> None:
    """Measure a network and add what comes out to the results in `folder`, which is made.

    Every rank calls this.

    Args:
        folder: where judged.yaml says what an earlier call has judged, and how: that goes on.
        model: the network; None for that of the folder.
        asked: what to measure; natural accuracy, and with it what looks wrong about the network,
            is always measured.

    Raises:
        UserError: there is no such network, it does not fit the images, or the folder is
            another's.
    """
    own = _own(folder, model, asked.overrides)
    config = asked.over(own)
    if "natural" not in config.eval.attacks:
        config = replace(asked, attacks=["natural", *config.eval.attacks]).over(own)
    accelerator = start_accelerator("fp32")
    start_logging(accelerator.is_main_process)
    with plain_failures(accelerator, "eval.batch_size", config.eval.batch_size):
        check_started_alike(config, accelerator, asked.arguments())
        data = load_test_images(config, accelerator)
        network = load_everywhere(config.model, "--model", data, accelerator)
        weights = digest_of(network)
        name = config.model.reference
        identity = {"weights": weights, "source": plugins.sources([name]).get(name)}
        check_same_start(accelerator, identity)
        on_main(accelerator, partial(_take, folder, own, accelerator, identity, data))
        subject = Subject(lambda: network, identity, {"weights": weights})
        home = load(folder.judged, [], Judged)
        measure(Measurement(folder, config, accelerator, own=home), subject, asked, data)


def _own(folder: RunFolder, model: Reference | None, overrides: Sequence[str]) -> Judged:
    """Return what the folder says, or what a new one will say, with the overrides."""
    if folder.judged.is_file():
        config = load(folder.judged, overrides, Judged)
        changed = _changed(load(folder.judged, [], Judged), config, model)
        if changed:
            raise UserError(f"{folder}: is of another network ({changed}); choose another --out")
        return config
    if model is None:
        raise UserError(f"{folder}: nothing was judged there; name a network with --model")
    if folder.path.exists() and any(folder.path.iterdir()):
        raise UserError(f"{folder}: is not empty and nothing was judged there; name another --out")
    return load(None, [f"model={json.dumps(model.model_dump())}", *overrides], Judged)


def _changed(before: Judged, now: Judged, model: Reference | None) -> str:
    """Return how the network that is asked for is none of the folder's; '' where it is that."""
    asked = now.model_copy(update={"model": model}) if model else now
    return "; ".join(line for line in differences(before, asked) if line.startswith("model."))


def _take(
    folder: RunFolder,
    config: Judged,
    accelerator: Accelerator,
    identity: Mapping[str, Any],
    data: Dataset,
) -> None:
    """Make the folder, or see whether it is of the same weights and the same code."""
    if folder.judged.is_file():
        before = reading.read_environment(folder.path)
        for what, now in identity.items():
            if before.get(what) != now:
                raise UserError(
                    f"{folder}: the network's {what} changed since it was judged there "
                    f"({before.get(what)} -> {now}); choose another --out"
                )
        claim.check_writable(folder)
        return
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error, "choose another --out") from None
    about = {
        **identity,
        "dataset": {
            "name": config.data.name,
            "test": len(data),
            "classes": data.classes,
            **data.known_by(),
        },
    }
    text = json.dumps(environment(accelerator) | about, indent=1)
    files.replace(folder.environment, text.encode())
    files.replace(folder.judged, config.dump().encode())
