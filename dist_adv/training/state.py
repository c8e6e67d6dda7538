"""What a checkpoint of a training run holds, and how a run goes on from one."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_adv.data import what_changed
from dist_adv.distributed.network import snapshot
from dist_adv.errors import UserError
from dist_adv.runs.checkpoint import Checkpoint
from dist_adv.training.collapse import Measured

if TYPE_CHECKING:
    from dist_adv.distributed.session import Session
    from dist_adv.training.trainer import Trainer

log = logging.getLogger("dist_adv")


@dataclass
class Clock:
    """How far a run is: passes done, batches done of the next pass, optimiser steps, seconds.

    `seconds` is wall time of training alone: no evaluation, no checkpoint, no set-up.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Best:
    """The pass with the highest robust accuracy on held-out images."""

    step: int
    epoch: float
    accuracy: float


def collect(trainer: "Trainer", session: "Session", wandb_id: str | None) -> Checkpoint | None:
    """Everything from which training goes on bit for bit, copied; None but on the main process.

    Weights (BatchNorm's statistics averaged over ranks, and each rank's own besides), momentum,
    what the method carries from batch to batch (as one tensor in the order of the global batch),
    the clock, the guard, the scaler, the configuration. Every rank calls this.
    """
    accelerator = trainer.accelerator
    snapshot(accelerator, trainer.net, trainer.copy)
    momentum = trainer.net.momentum()
    buffers = dict(trainer.net.bare.named_buffers())
    ranks = session.gather(
        {
            "method": _copied(trainer.method.state_dict()),
            "buffers": _copied({name: buffers[name] for name in buffers if "running_" in name}),
        }
    )
    if not accelerator.is_main_process:
        return None
    good = trainer.good if trainer.config.method.guard == "stop" else None
    groups = {
        "model": _copied(trainer.copy.state_dict()),
        "optimizer": _copied(
            {f"{index}.momentum_buffer": tensor for index, tensor in enumerate(momentum)}
        ),
        "method": {
            key: _interleave([rank["method"][key] for rank in ranks]) for key in ranks[0]["method"]
        },
        "ranks": {
            f"{rank}.{name}": tensor
            for rank, own in enumerate(ranks)
            for name, tensor in own["buffers"].items()
        },
        "good": _copied(good[1]) if good else {},
    }
    scaler = accelerator.scaler
    state = {
        "clock": asdict(trainer.clock),
        "pass_sums": trainer.pass_sums.tolist(),
        "guard": asdict(trainer.guarded) if trainer.guarded else None,
        "good_clock": asdict(good[0]) if good else None,
        "best": asdict(trainer.best) if trainer.best else None,
        "scaler": scaler.state_dict() if scaler else None,
        "world_size": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "wandb_id": wandb_id,
        "images": trainer.fingerprints,
        "config": trainer.config.model_dump(),
    }
    return Checkpoint(groups, state, {"architecture": json.dumps(trainer.copy.architecture)})


def check_images(trainer: "Trainer", saved: Checkpoint, path: Path, insist: bool) -> None:
    """Compare the images with those that a checkpoint was trained on.

    insist: go on with others, aloud, as far as they make as many batches.

    Raises UserError.
    """
    clock, batches = saved.state["clock"], trainer.loader.batches
    done = clock["epoch"] * batches + clock["batch"]
    fits = clock["step"] == done * trainer.method.steps_per_batch and clock["batch"] <= batches
    before = saved.state.get("images", {})  # an older version's checkpoint has none
    changed = what_changed(before, trainer.fingerprints)
    what = f" ({'; '.join(changed)})" if changed else ""
    if not fits:
        raise UserError(
            f"{path}: was trained on another number of images{what}: a pass has {batches} batches "
            f"now; restore them, or start a new run with --run-dir"
        )
    if changed and not insist:
        raise UserError(
            f"{path}: was trained on other images{what}; restore them, start a new run with "
            f"--run-dir, or go on with these all the same: --resume {path}"
        )
    if changed:
        log.warning("going on with other images than before%s", what)


def restore(trainer: "Trainer", saved: Checkpoint, path: Path) -> None:
    """Go on from a checkpoint, at this or another world size.

    Raises UserError for a checkpoint of another model or precision.
    """
    from dist_adv.training.state import Best, Clock

    accelerator, state = trainer.accelerator, saved.state
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if state["precision"] != accelerator.mixed_precision:
        before, now = (
            p.replace("no", "fp32") for p in (state["precision"], accelerator.mixed_precision)
        )
        raise UserError(
            f"{path}: was trained in {before} and train.precision=auto means {now} here; "
            f"go on where {before} is at hand"
        )
    weights = dict(saved.groups["model"])
    try:
        trainer.copy.load_state_dict(weights)
        if state["world_size"] == ranks:
            weights |= {
                name.split(".", 1)[1]: tensor
                for name, tensor in saved.groups["ranks"].items()
                if name.startswith(f"{rank}.")
            }
        trainer.net.load_state_dict(weights)
    except RuntimeError as error:
        problem = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
        raise UserError(f"{path}: is of another model ({problem}); check 'model'") from None
    momentum = saved.groups["optimizer"]
    trainer.net.load_momentum([momentum[f"{i}.momentum_buffer"] for i in range(len(momentum))])
    trainer.method.load_state_dict(
        {
            key: tensor[rank::ranks]
            .to(accelerator.device)
            .contiguous(memory_format=torch.channels_last)
            for key, tensor in saved.groups["method"].items()
        }
    )
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    trainer.nonfinite.restart()
    trainer.clock = Clock(**state["clock"])
    trainer.pass_sums = torch.tensor(state["pass_sums"], dtype=torch.float64)
    # Earlier versions saved the accuracy on one batch, which no accuracy on the sample is like.
    trainer.guarded = Measured(**state["guard"]) if state.get("guard") else None
    trainer.best = Best(**state["best"]) if state["best"] else None
    if state["good_clock"]:
        good = {
            name: tensor.to(accelerator.device) for name, tensor in saved.groups["good"].items()
        }
        trainer.good = Clock(**state["good_clock"]), good


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In host memory and nobody else's: training goes on while they are written."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _interleave(parts: list[Tensor]) -> Tensor:
    """The global tensor of which rank r of W holds rows r, r + W, ..."""
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole
