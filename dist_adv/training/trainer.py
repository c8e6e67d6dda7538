"""Training: the loop, and what happens between batches and at the end of an epoch.

`Trainer.fit` is the loop. What is not a step happens between batches: agreeing with the other
ranks, a line of metrics, a checkpoint; and at the end of each epoch the curve and the guard.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from dist_adv.attacks.threat import build as build_threat
from dist_adv.by_epoch import told
from dist_adv.config import Config
from dist_adv.data import Batch, Dataset, load_dataset
from dist_adv.data.extra import with_extra
from dist_adv.distributed.collectives import check_same_images, main_process_first, on_every
from dist_adv.distributed.session import Session
from dist_adv.errors import Preempted
from dist_adv.evaluation.evaluate import check_fit
from dist_adv.evaluation.results import Examples
from dist_adv.runs import checkpoint
from dist_adv.runs.folder import RunFolder
from dist_adv.tracking.tracker import Tracker
from dist_adv.training import collapse, metrics, state
from dist_adv.training.checks import check_splits
from dist_adv.training.collapse import Guard, Measured
from dist_adv.training.curve import Curve
from dist_adv.training.display import TrainingDisplay
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter
from dist_adv.training.state import Kept

log = logging.getLogger("dist_adv")


@dataclass(frozen=True)
class Surroundings:
    """What a start of a run trains in: its folder, the other ranks, records, a display.

    tracker: None but on the main process.
    """

    run: RunFolder
    session: Session
    tracker: Tracker | None
    display: TrainingDisplay


class Trainer:
    """One experiment on this process: what learns, on which data, and what it keeps.

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
        train, self.test_data = data or on_every(accelerator, self._load)
        train = with_extra(train, config.data)
        prints = {"train": train.fingerprint, "test": self.test_data.fingerprint}
        if train.extra:
            prints["extra"] = train.extra.fingerprint
        check_same_images(accelerator, prints, config.data.name)
        check_splits(train, self.test_data)
        held_out = config.data.validation
        train, curve_data = train.hold_out(held_out) if held_out else (train, self.test_data)
        self.learner = Learner(config, accelerator, train)
        threat = build_threat(config.threat.norm, config.threat.eps)
        check_fit(self.learner.copy, self.test_data, config.eval)
        curve = Curve(config.eval, curve_data, bool(held_out), threat, accelerator)
        self.kept = Kept(prints, Guard(config.method), curve, torch.zeros(4, dtype=torch.float64))
        self.writer = checkpoint.Writer()

    def _load(self) -> tuple[Dataset, Dataset]:
        first = partial(main_process_first, self.accelerator)
        data, as_files = self.config.data, self.config.resizes
        return load_dataset(data, "train", first, as_files), load_dataset(data, "test", first)

    @property
    def finished(self) -> bool:
        return self.kept.guard.stopped or self.learner.clock.step >= self.learner.total_steps

    def fit(self, around: Surroundings) -> None:
        """Train until the schedule ends or the guard stops; the copy then has the final weights.

        Raises Preempted, on all ranks after the same batch and with a checkpoint of it complete.
        """
        learner, meter = self.learner, Meter(self.accelerator.device)
        learner.settle()
        while True:
            around.session.watchdog.beat()
            meter.start()
            for batch in self._rest_of_the_epoch():
                learner.learn(batch, meter)
                learner.clock.batch += 1
                self.between_batches(around, meter)
                if self.finished:
                    break
            self._close_epoch(around)
            if self.finished:
                self.writer.wait()
                return

    def _rest_of_the_epoch(self) -> Iterator[Batch]:
        """Yield the batches that are left; none if the checkpoint is of an epoch not closed yet."""
        if self.finished:
            return iter(())
        learner, clock = self.learner, self.learner.clock
        before = learner.stage
        learner.enter(clock.epoch)
        if learner.stage is not before:
            self.kept.guard.reference = None  # of another ball, attack or size
            changed = told(self.config.changes, clock.epoch)
            log.info("from epoch %d on: %s", clock.epoch + 1, changed)
        return learner.loader.epoch(clock.epoch, start=clock.batch)

    def between_batches(self, around: Surroundings, meter: Meter) -> None:
        """Agree with the other ranks; log, save and stop where it is time to."""
        train, clock = self.config.train, self.learner.clock
        stop, save = around.session.boundary()
        self.writer.check()
        ends = self.finished or clock.batch == self.learner.loader.batches
        before = clock.step - self.learner.method.steps_per_batch
        counted = train.save_steps and clock.step // train.save_steps > before // train.save_steps
        save = bool(save or ends or stop or counted)
        if save or clock.batch % train.log_every == 0:
            self.learner.check_updates()
            self.learner.check_graphs()
            latest = meter.take(self.accelerator)
            self.kept.sums += latest
            clock.seconds += latest[3].item()
            if latest[2] > 0:  # else every update was skipped
                record = metrics.line("train", self.learner, latest)
                record |= metrics.speeds(self.learner, meter)
                record |= {f"method_{name}": mean for name, mean in meter.means.items()}
                around.display.update(record)
                if around.tracker:
                    around.tracker.metrics(record)
        if save:
            self.save(around)
            meter.start()
        if stop:
            self.writer.wait()
            raise Preempted(stop)

    def _close_epoch(self, around: Surroundings) -> None:
        """Measure the curve and the guard, log the epoch: a resumed run can do all of it again."""
        clock = self.learner.clock
        if clock.batch == self.learner.loader.batches:
            clock.epoch, clock.batch = clock.epoch + 1, 0
        curve, examples = self.point(around.session)
        record = metrics.line("epoch", self.learner, self.kept.sums)
        record |= curve | self._look_for_collapse(around)
        around.display.epoch(record, self.config.train.epochs)
        if around.tracker:
            around.tracker.metrics(record, examples)
        self.kept.sums = torch.zeros_like(self.kept.sums)

    def point(self, session: Session) -> tuple[dict[str, Any], Examples | None]:
        """Copy the weights and, where it is time for a point of the curve, measure the copy.

        Where they are an average, those in training are measured as well, as `raw_...`.
        """
        learner, every, curve = self.learner, self.config.eval.every, self.kept.curve
        learner.update_copy()
        if not every or (learner.clock.epoch % every and not self.finished):
            return {}, None
        figures, examples = curve.measure(learner.copy, session.between_chunks)
        curve.remember(figures, learner.clock, learner.epochs)
        if learner.average:
            raw, _ = curve.measure(learner.raw_copy(), session.between_chunks)
            figures |= {f"raw_{key}": raw[key] for key in raw if key.endswith("_accuracy")}
        return figures, examples

    def _look_for_collapse(self, around: Surroundings) -> dict[str, Any]:
        learner, guard = self.learner, self.kept.guard
        if guard.mode == "none":
            return {}
        now = self._measured(around.session)
        return guard.look(now, learner.clock, learner.loader.batches, learner.copy)

    def _measured(self, session: Session) -> Measured:
        """Measure what the guard's rule looks at, of the weights in the copy."""
        learner = self.learner
        if self.kept.guard.rule == "wong":
            first = next(learner.loader.epoch(max(0, math.ceil(learner.epochs) - 1)))
            return collapse.on_batch(learner.copy, first, learner.threat, self.accelerator)
        return collapse.on_sample(
            learner.copy,
            learner.data,
            learner.threat,
            self.accelerator,
            self.config.eval.batch_size,
            session.between_chunks,
        )

    def trained(self) -> dict[str, float]:
        """Return how many epochs and optimiser steps made the weights in the copy."""
        guard, clock = self.kept.guard, self.learner.clock
        kept = guard.good[0] if guard.stopped and guard.good else clock
        return {"epoch": kept.epochs(self.learner.loader.batches), "step": kept.step}

    def save(self, around: Surroundings) -> None:
        """Save a checkpoint from which training goes on bit for bit. Every rank calls this.

        The main process copies the tensors and writes them in the background.
        """
        tracker, best = around.tracker, self.kept.curve.best
        wandb_id = tracker.wandb_id if tracker else None
        saved = state.collect(self.learner, self.kept, around.session, wandb_id)
        if saved:
            spare, keep = [best.step] if best else [], self.config.train.keep
            step = self.learner.clock.step
            self.writer.save(around.run.checkpoints, step, saved, keep, spare)
