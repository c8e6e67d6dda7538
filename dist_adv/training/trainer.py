"""Training: one optimiser step for each loss that a method yields.

`Trainer.fit` is the loop. What is not a step happens between batches: agreeing with the other
ranks, a line of metrics, a checkpoint; and at the end of each pass the curve and the guard.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import Progress
from torch import Tensor

from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import Config
from dist_adv.data import Batch, Dataset, Loader, load_dataset
from dist_adv.distributed import engines
from dist_adv.distributed.collectives import check_same_images, main_process_first, on_every
from dist_adv.distributed.network import compile_network, settle, snapshot, synchronised
from dist_adv.distributed.session import Session
from dist_adv.errors import Preempted, RunFailure
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.evaluation.results import Examples
from dist_adv.methods import build_method
from dist_adv.models import build_model
from dist_adv.runs import checkpoint
from dist_adv.tracking.tracker import Tracker
from dist_adv.training import collapse, state
from dist_adv.training.checks import check_splits, check_statistics
from dist_adv.training.collapse import Measured
from dist_adv.training.display import TrainingDisplay
from dist_adv.training.meter import Meter
from dist_adv.training.nonfinite import NonFinite
from dist_adv.training.schedule import lr_at, momentum_at
from dist_adv.training.state import Best, Clock

log = logging.getLogger("dist_adv")


class Trainer:
    """One experiment on this process: data, model, method, and how far it is.

    data: the train and test split, where they are not to be loaded as `config.data` says.

    Raises UserError for what does not fit together: data, model, ranks, precision, checkpoint.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        data: tuple[Dataset, Dataset] | None = None,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        if data is None:
            data = on_every(accelerator, self._load)
        self.train_data, self.test_data = data
        self.fingerprints = {"train": data[0].fingerprint, "test": data[1].fingerprint}
        check_same_images(accelerator, self.fingerprints)
        check_splits(self.train_data, self.test_data)
        self.curve_data = self.test_data
        if config.data.validation:
            self.train_data, self.curve_data = self.train_data.hold_out(config.data.validation)
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
        check_statistics(config, self.loader.smallest_share)
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
        trained = synchronised(accelerator, model) if config.train.sync_batchnorm else model
        compile_network(trained, config.train.compile)
        self.net = engines.prepare(accelerator, trained, config.optim, config.train)
        self.optimizer = self.net.optimizer
        self.nonfinite = NonFinite(
            self.net.bare,
            self.net.guarded,
            self.net.gradient_norm,
            config.train.on_nan,
            scaled=accelerator.scaler is not None,
        )
        self.writer = checkpoint.Writer()
        self.clock = Clock()
        self.pass_sums = torch.zeros(4, dtype=torch.float64)
        self.best: Best | None = None
        self.guarded: Measured | None = None
        self.good: tuple[Clock, dict[str, Tensor]] | None = None
        self.stopped, self.skipped = False, 0

    def _load(self) -> tuple[Dataset, Dataset]:
        first = partial(main_process_first, self.accelerator)
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

    def fit(
        self, run_dir: Path, session: Session, tracker: Tracker | None, progress: Progress
    ) -> None:
        """Train until the schedule ends or the guard stops; `copy` then has the final weights.

        Raises Preempted, on all ranks after the same batch and with a checkpoint of it complete.
        """
        clock, meter = self.clock, Meter(self.accelerator.device)
        display = TrainingDisplay(progress, self.total_steps, clock.step)
        settle(self.accelerator, self.net, self.train_data)
        while True:
            session.watchdog.beat()
            meter.start()
            for batch in self._rest_of_the_pass():
                self.learn(batch, meter)
                clock.batch += 1
                self._between_batches(run_dir, session, tracker, meter, display)
                if self.finished:
                    break
            self._close_pass(session, tracker, display)
            if self.finished:
                self.writer.wait()
                return

    def learn(self, batch: Batch, meter: Meter) -> None:
        """One optimiser step for each loss that the method yields; nothing waits for the device."""
        for out in self.method.steps(self.net, batch):
            self._set_rates()
            weight = self.nonfinite.mark(out.loss, batch.weight)
            self.accelerator.backward(out.loss * weight)
            self.nonfinite.before_update(out.loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.clock.step += 1
            meter.add(out, batch.y)

    def _rest_of_the_pass(self) -> Iterator[Batch]:
        """Nothing where a run goes on from a checkpoint of a pass that was not closed yet."""
        if self.finished:
            return iter(())
        return self.loader.epoch(self.clock.epoch, start=self.clock.batch)

    def _set_rates(self) -> None:
        """Before the backward pass: some engines take the step inside it."""
        lr, momentum = self._rates(self.clock.step)
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = lr, momentum

    def _rates(self, step: int) -> tuple[float, float]:
        """The learning rate and the momentum of an optimiser step, counted from 0."""
        optim, total = self.config.optim, self.total_steps
        return (
            lr_at(optim.schedule, optim.lr, step, total, optim.rise),
            momentum_at(optim.momentum, optim.cycle_momentum, step, total, optim.rise),
        )

    def _between_batches(
        self,
        run_dir: Path,
        session: Session,
        tracker: Tracker | None,
        meter: Meter,
        display: TrainingDisplay,
    ) -> None:
        """Agree with the other ranks; log, save and stop where it is time to."""
        train, clock = self.config.train, self.clock
        stop, save = session.boundary()
        self.writer.check()
        ends = self.finished or clock.batch == self.loader.batches
        before = clock.step - self.method.steps_per_batch
        counted = train.save_steps and clock.step // train.save_steps > before // train.save_steps
        save = bool(save or ends or stop or counted)
        if save or clock.batch % train.log_every == 0:
            self._heed_trouble()
            latest = meter.take(self.accelerator)
            self.pass_sums += latest
            clock.seconds += latest[3].item()
            if latest[2] > 0:  # else every update was skipped
                record = self._record("train", latest) | self._ranks(meter)
                display.update(record)
                if tracker:
                    tracker.metrics(record)
        if save:
            self.save(run_dir, session, tracker)
            meter.start()
        if stop:
            self.writer.wait()
            raise Preempted(stop)

    def _close_pass(
        self, session: Session, tracker: Tracker | None, display: TrainingDisplay
    ) -> None:
        """The curve, the guard and the line of a pass, all of which a resumed run can do again."""
        if self.clock.batch == self.loader.batches:
            self.clock.epoch, self.clock.batch = self.clock.epoch + 1, 0
        curve, examples = self._curve(session)
        record = self._record("epoch", self.pass_sums) | curve | self._guard(session)
        display.passed(record, self.config.train.epochs)
        if tracker:
            tracker.metrics(record, examples)
        self.pass_sums = torch.zeros_like(self.pass_sums)

    def _heed_trouble(self) -> None:
        """Raises RunFailure, on every rank, where updates that are not finite end the run."""
        trouble = self.nonfinite.trouble(self.accelerator)
        if trouble is None or trouble.count == self.skipped:
            return
        per_batch = self.method.steps_per_batch
        step = self.clock.step - self.nonfinite.seen + trouble.first
        epoch, batch = divmod((step - 1) // per_batch, self.loader.batches)
        ranks = ", ".join(map(str, trouble.ranks))
        what = f"the loss of rank {ranks}" if ranks else "a gradient"
        where = f"at optimiser step {step} (pass {epoch + 1}, batch {batch + 1})"
        train = self.config.train
        if train.on_nan == "skip" and trouble.count <= train.skip_limit:
            self.skipped = trouble.count
            log.warning("%d updates skipped; %s was not finite %s", self.skipped, what, where)
            return
        many = f"; more than train.skip_limit={train.skip_limit} updates were skipped"
        raise RunFailure(
            f"{what} was not finite {where}{many if train.on_nan == 'skip' else ''}: no update "
            f"was taken from it and checkpoints are older; try a smaller optim.lr or "
            f"train.precision=fp32" + ("" if train.on_nan == "skip" else ", or train.on_nan=skip")
        )

    def _record(self, kind: str, sums: Tensor) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        loss, correct, n, seconds = sums.tolist()
        if n == 0:
            raise RunFailure(f"no update of pass {self.passes:g} was finite: nothing is learnt")
        lr, momentum = self._rates(self.clock.step - 1)
        prefix = "train_" if kind == "epoch" else ""
        return {
            "kind": kind,
            "epoch": round(self.passes, 4),
            "step": self.clock.step,
            f"{prefix}loss": loss / n,
            f"{prefix}accuracy": correct / n,
            "lr": lr,
            "momentum": momentum,
            "images_per_s": n / self.method.steps_per_batch / seconds,
            "epoch_seconds" if kind == "epoch" else "lap_seconds": seconds,
            "seconds": self.clock.seconds,
            **({"skipped_updates": self.skipped} if self.skipped else {}),
        }

    def _ranks(self, meter: Meter) -> dict[str, float]:
        """The slowest and the fastest rank.

        They wait for each other's gradients: what differs is their share of a batch, and what
        they do after the last exchange.
        """
        rates = meter.rates / self.method.steps_per_batch
        return {
            "rank_images_per_s_min": rates.min().item(),
            "rank_images_per_s_max": rates.max().item(),
        }

    def _curve(self, session: Session) -> tuple[dict[str, Any], Examples | None]:
        """Copy the weights and measure the copy on some held-out or test images."""
        snapshot(self.accelerator, self.net, self.copy)
        options = self.config.eval
        if not options.every or (self.clock.epoch % options.every and not self.finished):
            return {}, None
        (natural, fgsm, pgd), examples = evaluate(
            self.copy,
            self.curve_data,
            self.threat,
            options,
            self.accelerator,
            ["natural", "fgsm", options.curve_attack],
            options.curve_limit,
            between=session.between_chunks,
        )
        # Test images choose nothing: a best pass is one on held-out training images.
        if self.config.data.validation and (not self.best or pgd.accuracy > self.best.accuracy):
            self.best = Best(self.clock.step, self.passes, pgd.accuracy)
        figures = {
            "curve_split": "held-out" if self.config.data.validation else "test",
            "test_loss": natural.loss,
            "test_accuracy": natural.accuracy,
            "fgsm_accuracy": fgsm.accuracy,
            "pgd_loss": pgd.loss,
            "pgd_accuracy": pgd.accuracy,
            "curve_attack": pgd.attack,
            "curve_n": pgd.n,
        }
        return figures, examples

    def _guard(self, session: Session) -> dict[str, Any]:
        """The rule of `guard.py`; `stop` puts the weights of the last good pass into `copy`."""
        method = self.config.method
        if method.guard == "none":
            return {}
        now, before = self._measured(session), self.guarded
        tripped = before is not None and now.collapsed(before)
        self.guarded = now.reference(before)
        if before and tripped:
            log.warning("catastrophic overfitting in pass %g: %s", self.passes, now.since(before))
        if method.guard == "stop":
            if tripped:
                assert self.good is not None
                self.copy.load_state_dict(self.good[1])
                self.stopped = True
                log.warning("stopped; the weights of pass %g are kept", self._passes(self.good[0]))
            else:
                self.good = replace(self.clock), _clone(self.copy.state_dict())
        return now.record() | {"guard_tripped": tripped}

    def _measured(self, session: Session) -> Measured:
        """What the guard's rule looks at, of the weights in `copy`."""
        if self.config.method.guard_rule == "wong":
            first = next(self.loader.epoch(max(0, math.ceil(self.passes) - 1)))
            return collapse.on_batch(self.copy, first, self.threat, self.accelerator)
        return collapse.on_sample(
            self.copy,
            self.train_data,
            self.threat,
            self.accelerator,
            self.config.eval.batch_size,
            session.between_chunks,
        )

    def trained(self) -> dict[str, float]:
        """How many passes and optimiser steps made the weights in `copy`."""
        kept = self.good[0] if self.stopped and self.good else self.clock
        return {"epoch": self._passes(kept), "step": kept.step}

    def save(self, run_dir: Path, session: Session, tracker: Tracker | None) -> None:
        """A checkpoint from which training goes on bit for bit. Every rank calls this.

        The main process copies the tensors and writes them in the background.
        """
        saved = state.collect(self, session, tracker.wandb_id if tracker else None)
        if saved:
            folder, keep = run_dir / "checkpoints", self.config.train.keep
            spare = [self.best.step] if self.best else []
            self.writer.save(folder, self.clock.step, saved, keep, spare)


def _clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
