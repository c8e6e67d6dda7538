"""Training: one optimiser step for each loss that a method yields.

`Trainer.fit` is the loop. What is not a step happens between batches: a line of metrics, and at
the end of each pass the guard, the curve's evaluation and a checkpoint.
"""

import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.progress import Progress
from torch import Tensor

from dist_adv import checkpoint, parallel
from dist_adv.checkpoint import Checkpoint
from dist_adv.config import Config
from dist_adv.data import Dataset, Loader, load_dataset
from dist_adv.errors import RunFailure, UserError
from dist_adv.evaluate import evaluate
from dist_adv.guard import FALL, robust_accuracy
from dist_adv.methods import Step, build_method
from dist_adv.models import build_model
from dist_adv.progress import TrainingDisplay
from dist_adv.schedule import lr_at, momentum_at
from dist_adv.threat import build as build_threat
from dist_adv.track import Tracker

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


class Meter:
    """Loss, correct answers and samples of this rank, summed on the device; and wall time."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.start()

    def start(self) -> None:
        """Count time from now."""
        self.began = time.perf_counter()

    def add(self, out: Step, y: Tensor) -> None:
        """Count one step; waits for nothing."""
        n = len(y)
        correct = (out.logits.detach().argmax(1) == y).sum()
        loss = out.loss.detach().double() * n
        self.sums += torch.stack([loss, correct, torch.full_like(correct, n)])

    def take(self, accelerator: Accelerator) -> Tensor:
        """[loss, correct, samples] of all ranks and seconds since the last call; waits for them."""
        sums = parallel.total(accelerator, self.sums).cpu()
        seconds = time.perf_counter() - self.began
        self.sums.zero_()
        self.start()
        return torch.cat([sums, torch.tensor([seconds], dtype=sums.dtype)])


class Trainer:
    """One experiment on this process: data, model, method, and how far it is.

    Raises UserError for what does not fit together: data, model, ranks, precision, checkpoint.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.train_data, self.test_data = parallel.on_every(accelerator, self._load)
        if self.train_data.classes != self.test_data.classes:
            raise UserError(
                f"data.root: the train split has the classes {self.train_data.classes} and the "
                f"test split {self.test_data.classes}; they must be the same"
            )
        self.loader = Loader(
            self.train_data,
            config.train.batch_size,
            config.train.seed,
            accelerator.device,
            config.data.augment,
            config.data.drop_last,
            accelerator.process_index,
            accelerator.num_processes,
        )
        if config.model.norm == "batch" and self.loader.smallest_share == 1:
            raise UserError(
                "train.batch_size: leaves a rank 1 image in some batch, of which BatchNorm has no "
                "statistics; set data.drop_last=true, another batch size or model.norm=group"
            )
        self.threat = build_threat(config.threat.norm, config.threat.eps)
        self.method = build_method(config.method, self.threat)
        mean, std = self.train_data.statistics()
        # One model trains; the other is its plain fp32 copy, which is evaluated and saved.
        model, self.copy = (
            build_model(config.model, mean, std, self.train_data.classes, config.train.seed).to(
                accelerator.device
            )
            for _ in range(2)
        )
        sgd = torch.optim.SGD(
            model.parameters(),
            config.optim.lr,
            config.optim.momentum,
            weight_decay=config.optim.weight_decay,
        )
        prepared, self.optimizer = accelerator.prepare(model.train(), sgd)
        self.net = parallel.TrainNet(accelerator, prepared)
        self.clock = Clock()
        self.guard_accuracy: float | None = None
        self.good: tuple[Clock, dict[str, Tensor]] | None = None
        self.stopped = False

    def _load(self) -> tuple[Dataset, Dataset]:
        first = partial(parallel.main_process_first, self.accelerator)
        data = self.config.data
        return load_dataset(data, "train", first), load_dataset(data, "test", first)

    @property
    def total_steps(self) -> int:
        """Optimiser steps that the schedule spans: passes x batches x replays, or max_steps."""
        train, per_batch = self.config.train, self.method.steps_per_batch
        planned = train.epochs * self.loader.batches * per_batch
        if train.max_steps is None:
            return planned
        return min(planned, math.ceil(train.max_steps / per_batch) * per_batch)

    @property
    def finished(self) -> bool:
        return self.stopped or self.clock.step >= self.total_steps

    @property
    def passes(self) -> float:
        """Passes over the data so far, replays not counted."""
        return self._passes(self.clock)

    def _passes(self, clock: Clock) -> float:
        return clock.epoch + clock.batch / self.loader.batches

    def fit(self, run_dir: Path, tracker: Tracker | None, progress: Progress) -> None:
        """Train until the schedule ends or the guard stops; `copy` then has the final weights."""
        clock, meter = self.clock, Meter(self.accelerator.device)
        display = TrainingDisplay(progress, self.total_steps, clock.step)
        while not self.finished:
            sums = torch.zeros(4)
            meter.start()
            for batch in self.loader.epoch(clock.epoch, start=clock.batch):
                for out in self.method.steps(self.net, batch):
                    self._set_rates()
                    self.accelerator.backward(out.loss * batch.weight)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    clock.step += 1
                    meter.add(out, batch.y)
                clock.batch += 1
                ends = self.finished or clock.batch == self.loader.batches
                if ends or clock.batch % self.config.train.log_every == 0:
                    latest = meter.take(self.accelerator)
                    sums += latest
                    clock.seconds += latest[3].item()
                    record = self._record("train", latest)
                    display.update(record)
                    if tracker:
                        tracker.metrics(record)
                if ends:
                    break
            if clock.batch == self.loader.batches:
                clock.epoch, clock.batch = clock.epoch + 1, 0
            record = self._record("epoch", sums) | self._curve() | self._guard()
            display.passed(record, self.config.train.epochs)
            if tracker:
                tracker.metrics(record)
            if not self.stopped:
                self.save(run_dir, tracker)

    def _set_rates(self) -> None:
        """Before the backward pass: some engines take the step inside it."""
        optim = self.config.optim
        step, total = self.clock.step, self.total_steps
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(optim.schedule, optim.lr, step, total)
            group["momentum"] = momentum_at(optim.momentum, optim.cycle_momentum, step, total)

    def _record(self, kind: str, sums: Tensor) -> dict[str, Any]:
        """A line of metrics.jsonl. Raises RunFailure where the loss is no longer a number."""
        loss, correct, n, seconds = sums.tolist()
        if not math.isfinite(loss):
            raise RunFailure(
                f"the loss is {loss} at optimiser step {self.clock.step} (pass {self.passes:.2f}); "
                f"try a smaller optim.lr or train.precision=fp32"
            )
        group = self.optimizer.param_groups[0]
        prefix = "train_" if kind == "epoch" else ""
        return {
            "kind": kind,
            "epoch": round(self.passes, 4),
            "step": self.clock.step,
            f"{prefix}loss": loss / n,
            f"{prefix}accuracy": correct / n,
            "lr": group["lr"],
            "momentum": group["momentum"],
            "images_per_s": n / self.method.steps_per_batch / seconds,
            "epoch_seconds" if kind == "epoch" else "lap_seconds": seconds,
            "seconds": self.clock.seconds,
        }

    def _curve(self) -> dict[str, Any]:
        """Copy the weights and measure the copy on some test images."""
        parallel.snapshot(self.accelerator, self.net, self.copy)
        options = self.config.eval
        if not options.every or (self.clock.epoch % options.every and not self.finished):
            return {}
        (natural, fgsm, pgd), _ = evaluate(
            self.copy,
            self.test_data,
            self.threat,
            options,
            self.accelerator,
            ["natural", "fgsm", options.curve_attack],
            options.curve_limit,
        )
        return {
            "test_loss": natural.loss,
            "test_accuracy": natural.accuracy,
            "fgsm_accuracy": fgsm.accuracy,
            "pgd_loss": pgd.loss,
            "pgd_accuracy": pgd.accuracy,
            "curve_attack": pgd.attack,
            "curve_n": pgd.n,
        }

    def _guard(self) -> dict[str, Any]:
        """The rule of `guard.py`; `stop` puts the weights of the pass before into `copy`."""
        mode = self.config.method.guard
        if mode == "none":
            return {}
        first = next(self.loader.epoch(max(0, math.ceil(self.passes) - 1)))
        accuracy = robust_accuracy(self.copy, first, self.threat, self.accelerator)
        before, self.guard_accuracy = self.guard_accuracy, accuracy
        tripped = before is not None and before - accuracy > FALL
        if tripped:
            log.warning(
                "catastrophic overfitting in pass %g: PGD-5 accuracy on training images fell by "
                "more than %g to %.1f %%",
                self.passes,
                FALL,
                100 * accuracy,
            )
        if mode == "stop":
            if tripped:
                assert self.good is not None
                self.copy.load_state_dict(self.good[1])
                self.stopped = True
                log.warning("stopped; the weights of pass %g are kept", self._passes(self.good[0]))
            else:
                self.good = replace(self.clock), _clone(self.copy.state_dict())
        return {"guard_accuracy": accuracy, "guard_tripped": tripped}

    def trained(self) -> dict[str, float]:
        """How many passes and optimiser steps made the weights in `copy`."""
        kept = self.good[0] if self.stopped and self.good else self.clock
        return {"epoch": self._passes(kept), "step": kept.step}

    def save(self, run_dir: Path, tracker: Tracker | None) -> None:
        """A checkpoint from which training goes on bit for bit. Every rank calls this."""
        state = self.net.bare.state_dict()
        mine = {
            "method": {key: tensor.cpu() for key, tensor in self.method.state_dict().items()},
            "buffers": {name: state[name].cpu() for name in state if _is_statistic(name)},
        }
        ranks = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]

        def write() -> None:
            optimizer = self.optimizer.state_dict()["state"]
            groups = {
                "model": self.copy.state_dict(),
                "optimizer": {
                    f"{index}.{key}": value
                    for index, values in optimizer.items()
                    for key, value in values.items()
                    if value is not None
                },
                "method": {
                    key: _interleave([rank["method"][key] for rank in ranks])
                    for key in mine["method"]
                },
                "ranks": {
                    f"{rank}.{name}": tensor
                    for rank, own in enumerate(ranks)
                    for name, tensor in own["buffers"].items()
                },
            }
            scaler = self.accelerator.scaler
            about = {
                "clock": asdict(self.clock),
                "guard_accuracy": self.guard_accuracy,
                "scaler": scaler.state_dict() if scaler else None,
                "world_size": self.accelerator.num_processes,
                "wandb_id": tracker.wandb_id if tracker else None,
                "config": self.config.model_dump(),
            }
            keep = self.config.train.keep
            checkpoint.save(
                run_dir / "checkpoints", self.clock.step, Checkpoint(groups, about), keep
            )

        parallel.on_main(self.accelerator, write)

    def restore(self, saved: Checkpoint, path: Path) -> None:
        """Go on from a checkpoint, at this or another world size.

        Raises UserError for a checkpoint of another model.
        """
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        weights = dict(saved.groups["model"])
        try:
            self.copy.load_state_dict(weights)
            if saved.state["world_size"] == ranks:
                weights |= {
                    name.split(".", 1)[1]: tensor
                    for name, tensor in saved.groups["ranks"].items()
                    if name.startswith(f"{rank}.")
                }
            self.net.bare.load_state_dict(weights)
        except RuntimeError as error:
            problem = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
            raise UserError(f"{path}: is of another model ({problem}); check 'model'") from None
        self._restore_optimizer(saved.groups["optimizer"])
        self.method.load_state_dict(
            {
                key: tensor[rank::ranks]
                .to(self.accelerator.device)
                .contiguous(memory_format=torch.channels_last)
                for key, tensor in saved.groups["method"].items()
            }
        )
        if self.accelerator.scaler and saved.state["scaler"]:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        self.clock = Clock(**saved.state["clock"])
        self.guard_accuracy = saved.state["guard_accuracy"]
        self.good = replace(self.clock), _clone(self.copy.state_dict())

    def _restore_optimizer(self, tensors: Any) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            # In the parameter's own memory layout, as the optimiser made it.
            like = torch.empty_like(parameters[int(index)])
            state.setdefault(int(index), {})[key] = like.copy_(tensor)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def _clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _interleave(parts: list[Tensor]) -> Tensor:
    """The global tensor of which rank r of W holds rows r, r + W, ..."""
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole
