"""Anybody's network under attacks, in a folder of its own."""

import json
import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from dist_adv import files
from dist_adv.config import Judged, Reference, differences, load, parse_yaml
from dist_adv.data import Dataset
from dist_adv.distributed.collectives import (
    check_started_alike,
    main_process_first,
    on_every,
    on_main,
)
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.start import start_accelerator
from dist_adv.errors import UserError, unwritable
from dist_adv.judging.finished_run import evaluate_run
from dist_adv.judging.measurement import Measurement, Subject, load_test_images, with_attacks
from dist_adv.judging.network import digest_of, load_network
from dist_adv.models import check_answers
from dist_adv.runs import claim
from dist_adv.runs.environment import environment
from dist_adv.runs.folder import RunFolder
from dist_adv.terminal import start_logging

log = logging.getLogger("dist_adv")


def folder_of(model: Reference) -> Path:
    """Return where a network's figures go that were not told: judged/ and what it is called."""
    words = [model.reference, *map(str, model.args.values())]
    return Path("judged", re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("-.")[:100])


def judge_network(
    reference: str,
    args: Sequence[str],
    out: Path | None,
    attacks: Sequence[str],
    limit: int | None,
    overrides: Sequence[str],
) -> None:
    """Judge a network by its reference; `args` are `key=value` of the function that makes it.

    Raises UserError as `judge` does.
    """
    given = {}
    for each in args:
        key, equals, text = each.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--model-args: {each!r} is no argument; write key=value")
        given[key] = parse_yaml(text, f"--model-args: {key}")
    model = Reference(reference=reference, args=given)
    judge(RunFolder(out or folder_of(model)), model, attacks, limit, overrides)


def judge_folder(
    folder: Path, attacks: Sequence[str], limit: int | None, overrides: Sequence[str]
) -> None:
    """Measure more of what a folder is of: a run, or somebody's network.

    Raises UserError as `judge` and `evaluate_run` do.
    """
    if RunFolder(folder).judged.is_file():
        judge(RunFolder(folder), None, attacks, limit, overrides)
    else:
        evaluate_run(folder, attacks, limit, overrides)


def judge(
    folder: RunFolder,
    model: Reference | None,
    attacks: Sequence[str],
    limit: int | None,
    overrides: Sequence[str],
) -> None:
    """Measure a network and add what comes out to the results in `folder`, which is made.

    Every rank calls this.

    Args:
        folder: where judged.yaml says what an earlier call has judged, and how: that goes on.
        model: the network; None for that of the folder.
        attacks, limit, overrides: what is asked for besides; natural accuracy, and with it what
            looks wrong about the network, is always measured.

    Raises:
        UserError: there is no such network, it does not fit the images, or the folder is
            another's.
    """
    own = _own(folder, model, overrides)
    config = with_attacks(own, attacks, limit)
    if "natural" not in config.eval.attacks:
        config = with_attacks(own, ["natural", *config.eval.attacks], limit)
    accelerator = start_accelerator("fp32")
    start_logging(accelerator.is_main_process)
    with plain_failures(accelerator, "eval.batch_size", config.eval.batch_size):
        network = on_every(accelerator, partial(_load, config.model, accelerator))
        weights = digest_of(network)
        check_started_alike(config, accelerator, {"weights": weights})
        data = load_test_images(config, accelerator)
        shape, classes = data.images.shape[1:], len(data.classes)
        check_answers(network, "--model: it", shape, classes)
        on_main(accelerator, partial(_take, folder, own, accelerator, weights, data))
        subject = Subject(lambda: network, {"weights": weights}, {"weights": weights})
        Measurement(folder, config, accelerator).take(subject, data)


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


def _load(model: Reference, accelerator: Accelerator) -> nn.Module:
    with main_process_first(accelerator):  # it may download
        return load_network(model)


def _take(
    folder: RunFolder, config: Judged, accelerator: Accelerator, weights: str, data: Dataset
) -> None:
    """Make the folder, or see whether it is of the same weights."""
    if folder.judged.is_file():
        before = json.loads(folder.environment.read_text())["weights"]
        if before != weights:
            raise UserError(
                f"{folder}: the network has other weights than when it was judged there "
                f"({weights[:12]}, not {before[:12]}); choose another --out"
            )
        claim.check_writable(folder)
        return
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error, "choose another --out") from None
    about = {
        "weights": weights,
        "sources": config.sources(),
        "dataset": {"name": config.data.name, "test": len(data), "classes": data.classes},
    }
    text = json.dumps(environment(accelerator) | about, indent=1)
    files.replace(folder.environment, text.encode())
    files.replace(folder.judged, config.dump().encode())
