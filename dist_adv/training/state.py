"""What a checkpoint of a training run holds, and how a run goes on from one."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_adv.config import Config
from dist_adv.data import Fingerprints, what_changed
from dist_adv.distributed.collectives import mean_statistics
from dist_adv.distributed.session import Session
from dist_adv.errors import UserError
from dist_adv.methods import ByPosition, BySample, Everywhere
from dist_adv.runs.checkpoint import Checkpoint
from dist_adv.training.averages import statistics
from dist_adv.training.clock import Best, Clock
from dist_adv.training.collapse import Guard, Measured
from dist_adv.training.curve import Curve
from dist_adv.training.learner import Learner

log = logging.getLogger("dist_adv")

# Of a checkpoint, by what a method carries; rows by position are in "method".
_GROUPS: dict[type[BySample | Everywhere], str] = {BySample: "tables", Everywhere: "everywhere"}


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
    optimizer = learner.net.optimizer_state()
    average, raw = learner.average, {}
    if average:  # else they are in the copy
        raw = mean_statistics(accelerator, learner.net.state_dict())
    carried = learner.method.carried()
    for each in carried.values():
        if isinstance(each, BySample):
            each.merge(learner.net.sum_over_ranks)
    rows = {name: each.rows for name, each in carried.items() if isinstance(each, ByPosition)}
    ranks = session.gather(
        {
            "method": _copied({name: own for name, own in rows.items() if own is not None}),
            "buffers": _copied(statistics(learner.net.bare)),
            "average": _copied(statistics(average.network)) if average else {},
        }
    )
    if not accelerator.is_main_process:
        return None
    good = kept.guard.good
    groups = {
        "model": _copied(learner.copy.state_dict()),
        "optimizer": _copied(
            {f"{i}.{key}": each for key, all_ in optimizer.items() for i, each in enumerate(all_)}
        ),
        "method": {
            key: _interleave([rank["method"][key] for rank in ranks]) for key in ranks[0]["method"]
        },
        "ranks": _by_rank(ranks, "buffers"),
        "good": _copied(good[1]) if good else {},
    }
    if average:
        groups["raw"] = _copied(raw)
        groups["ranks_average"] = _by_rank(ranks, "average")
    for kind, group in _GROUPS.items():
        chosen = {name: each for name, each in carried.items() if isinstance(each, kind)}
        if chosen:
            groups[group] = _copied({name: _whole(each) for name, each in chosen.items()})
    state = _numbers(learner, kept, wandb_id)
    return Checkpoint(groups, state, {"architecture": json.dumps(learner.copy.architecture)})


def _numbers(learner: Learner, kept: Kept, wandb_id: str | None) -> dict[str, Any]:
    """Return what of a checkpoint is no tensor."""
    accelerator, reference, good = learner.accelerator, kept.guard.reference, kept.guard.good
    scaler = accelerator.scaler
    return {
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
        "sources": learner.config.sources(),
        "start": learner.started_from,
        "config": learner.config.model_dump(),
    }


def check_sources(config: Config, saved: Checkpoint, path: Path, insist: bool) -> None:
    """Compare the sources of what is somebody else's with those that a checkpoint was trained by.

    insist: go on with others, aloud. Raises UserError.
    """
    before, now = saved.state.get("sources", {}), config.sources()
    changed = [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    if not changed:
        return
    what = ", ".join(f"{name} ({before[name]} -> {now[name]})" for name in changed)
    if not insist:
        raise UserError(
            f"{path}: was trained with another source of {what}; restore the file, start a new "
            f"run with --run-dir, or go on with it as it is now: --resume {path}"
        )
    log.warning("going on with another source of %s", what)


def check_images(learner: Learner, kept: Kept, saved: Checkpoint, path: Path, insist: bool) -> None:
    """Compare the images with those that a checkpoint was trained on.

    insist: go on with others, aloud, as far as they make as many batches.

    Raises UserError.
    """
    clock, batches = saved.state["clock"], learner.stages.at(saved.state["clock"]["epoch"]).batches
    done = learner.stages.batches_until(clock["epoch"]) + clock["batch"]
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
    learner.enter(state["clock"]["epoch"])
    judged = dict(saved.groups["model"])
    weights = dict(saved.groups.get("raw", {})) or judged
    own = state["world_size"] == ranks
    try:
        learner.copy.load_state_dict(judged)
        mine = _of_rank(rank, saved.groups["ranks"]) if own else {}
        learner.net.load_state_dict(weights | mine)
        if learner.average:
            mine = _of_rank(rank, saved.groups["ranks_average"]) if own else {}
            learner.average.network.load_state_dict(judged | mine)
    except RuntimeError as error:
        problem = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
        raise UserError(f"{path}: is of another model ({problem}); check 'model'") from None
    optimizer: dict[str, dict[int, Tensor]] = {}
    for name, tensor in saved.groups["optimizer"].items():
        index, key = name.split(".")
        optimizer.setdefault(key, {})[int(index)] = tensor
    learner.net.load_optimizer_state(
        {key: [found[i] for i in sorted(found)] for key, found in optimizer.items()}
    )
    _restore_carried(learner, saved, path)
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


def _restore_carried(learner: Learner, saved: Checkpoint, path: Path) -> None:
    """Give the method what it carried, each kind as this rank needs it.

    Raises UserError for a checkpoint without something that this method carries.
    """
    accelerator, device = learner.accelerator, learner.accelerator.device
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for name, each in learner.method.carried().items():
        if isinstance(each, ByPosition):  # none before the first batch that asked for it
            rows = saved.groups["method"].get(name)
            each.rows = None if rows is None else _on_device(rows[rank::ranks], device)
            continue
        whole = saved.groups.get(_GROUPS[type(each)], {}).get(name)
        now = _whole(each)
        if whole is None or whole.shape != now.shape or whole.dtype != now.dtype:
            raise UserError(
                f"{path}: has no {name!r} of the method as it is now; go on with the method that "
                f"wrote it, or start a new run with --run-dir"
            )
        now.copy_(whole)


def _whole(carried: BySample | Everywhere) -> Tensor:
    return carried.rows if isinstance(carried, BySample) else carried.value


def _by_rank(ranks: Sequence[Mapping[str, Any]], what: str) -> dict[str, Tensor]:
    """Return each rank's own tensors with its number before their names."""
    return {
        f"{rank}.{name}": tensor
        for rank, own in enumerate(ranks)
        for name, tensor in own[what].items()
    }


def _of_rank(rank: int, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.split(".", 1)[1]: tensor
        for name, tensor in group.items()
        if name.startswith(f"{rank}.")
    }


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
