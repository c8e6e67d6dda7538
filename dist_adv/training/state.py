"""What a checkpoint of a training run holds, and how a run goes on from one."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_adv.data import Fingerprints, what_changed
from dist_adv.distributed.session import Session
from dist_adv.errors import UserError
from dist_adv.runs.checkpoint import Checkpoint
from dist_adv.training.clock import Best, Clock
from dist_adv.training.collapse import Guard, Measured
from dist_adv.training.curve import Curve
from dist_adv.training.learner import Learner

log = logging.getLogger("dist_adv")


@dataclass
class Kept:
    """What a run keeps from epoch to epoch besides its learner.

    images: what the data sets are recognised by. sums: of the meter, over the epoch so far.
    """

    images: Fingerprints
    guard: Guard
    curve: Curve
    sums: Tensor


def collect(
    learner: Learner, kept: Kept, session: Session, wandb_id: str | None
) -> Checkpoint | None:
    """Everything from which training goes on bit for bit, copied; None but on the main process.

    Weights (BatchNorm's statistics averaged over ranks, and each rank's own besides), momentum,
    what the method carries from batch to batch (as one tensor in the order of the global batch),
    the clock, the guard, the scaler, the configuration. Every rank calls this.
    """
    accelerator = learner.accelerator
    learner.update_copy()
    momentum = learner.net.momentum()
    buffers = dict(learner.net.bare.named_buffers())
    ranks = session.gather(
        {
            "method": _copied(learner.method.state_dict()),
            "buffers": _copied({name: buffers[name] for name in buffers if "running_" in name}),
        }
    )
    if not accelerator.is_main_process:
        return None
    reference, good = kept.guard.reference, kept.guard.good
    groups = {
        "model": _copied(learner.copy.state_dict()),
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
        "clock": asdict(learner.clock),
        "pass_sums": kept.sums.tolist(),
        "guard": asdict(reference) if reference else None,
        "good_clock": asdict(good[0]) if good else None,
        "best": asdict(kept.curve.best) if kept.curve.best else None,
        "scaler": scaler.state_dict() if scaler else None,
        "world_size": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "wandb_id": wandb_id,
        "images": kept.images,
        "config": learner.config.model_dump(),
    }
    return Checkpoint(groups, state, {"architecture": json.dumps(learner.copy.architecture)})


def check_images(learner: Learner, kept: Kept, saved: Checkpoint, path: Path, insist: bool) -> None:
    """Compare the images with those that a checkpoint was trained on.

    insist: go on with others, aloud, as far as they make as many batches.

    Raises UserError.
    """
    clock, batches = saved.state["clock"], learner.loader.batches
    done = clock["epoch"] * batches + clock["batch"]
    fits = clock["step"] == done * learner.method.steps_per_batch and clock["batch"] <= batches
    before = saved.state.get("images", {})  # an older version's checkpoint has none
    changed = what_changed(before, kept.images)
    what = f" ({'; '.join(changed)})" if changed else ""
    if not fits:
        raise UserError(
            f"{path}: was trained on another number of images{what}: an epoch has {batches} "
            f"batches now; restore them, or start a new run with --run-dir"
        )
    if changed and not insist:
        raise UserError(
            f"{path}: was trained on other images{what}; restore them, start a new run with "
            f"--run-dir, or go on with these all the same: --resume {path}"
        )
    if changed:
        log.warning("going on with other images than before%s", what)


def restore(learner: Learner, kept: Kept, saved: Checkpoint, path: Path) -> None:
    """Go on from a checkpoint, at this or another world size.

    Raises UserError for a checkpoint of another model or precision.
    """
    accelerator, state = learner.accelerator, saved.state
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
        learner.copy.load_state_dict(weights)
        if state["world_size"] == ranks:
            weights |= {
                name.split(".", 1)[1]: tensor
                for name, tensor in saved.groups["ranks"].items()
                if name.startswith(f"{rank}.")
            }
        learner.net.load_state_dict(weights)
    except RuntimeError as error:
        problem = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
        raise UserError(f"{path}: is of another model ({problem}); check 'model'") from None
    momentum = saved.groups["optimizer"]
    learner.net.load_momentum([momentum[f"{i}.momentum_buffer"] for i in range(len(momentum))])
    learner.method.load_state_dict(
        {
            key: _on_device(tensor[rank::ranks], accelerator.device)
            for key, tensor in saved.groups["method"].items()
        }
    )
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    learner.nonfinite.restart()
    learner.clock = Clock(**state["clock"])
    kept.sums = torch.tensor(state["pass_sums"], dtype=torch.float64)
    # Earlier versions saved the accuracy on one batch, which no accuracy on the sample is like.
    kept.guard.reference = Measured(**state["guard"]) if state.get("guard") else None
    kept.curve.best = Best(**state["best"]) if state["best"] else None
    if state["good_clock"]:
        good = {
            name: tensor.to(accelerator.device) for name, tensor in saved.groups["good"].items()
        }
        kept.guard.good = Clock(**state["good_clock"]), good


def _on_device(rows: Tensor, device: torch.device) -> Tensor:
    """Move a method's rows to the device; images lie with their channels last, as batches do."""
    images = rows.dim() == 4
    layout = torch.channels_last if images else torch.contiguous_format
    return rows.to(device).contiguous(memory_format=layout)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory: training goes on while they are written."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _interleave(parts: list[Tensor]) -> Tensor:
    """Return the global tensor of which rank r of W holds rows r, r + W, ..."""
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole
