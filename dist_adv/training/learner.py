"""One batch learnt: a method, the network and its optimiser, its rates, its clock.

`Learner.learn` is the whole of a training step. When to log, measure, save and stop is the
`Trainer`'s; plans and benchmarks time a learner alone.
"""

import copy
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from dist_adv import rng
from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import Config
from dist_adv.data import Batch, Dataset, Loader, When
from dist_adv.distributed import engines, graphs
from dist_adv.distributed.network import compile_network, settle, snapshot, synchronised
from dist_adv.distributed.optimizers import set_rates
from dist_adv.errors import RunFailure, UserError
from dist_adv.methods import Objective, Task, build_method
from dist_adv.methods.carried import ByPosition
from dist_adv.methods.checked import checked_steps
from dist_adv.models import Classifier, build_model, check_answers, has_batchnorm
from dist_adv.training.averages import Average
from dist_adv.training.checks import (
    check_parts,
    check_pictures,
    check_rows,
    check_statistics,
    check_strides,
)
from dist_adv.training.clock import Clock
from dist_adv.training.meter import Meter
from dist_adv.training.nonfinite import NonFinite
from dist_adv.training.perturbation import WeightPerturbation
from dist_adv.training.schedule import lr_at, momentum_at
from dist_adv.training.stages import Stage, Stages
from dist_adv.training.start import Start, read_start

log = logging.getLogger("dist_adv")

# Of fp16's losses. It begins at 2^16 and is halved with every update that is skipped for a gradient
# that is not finite: a healthy one has come back long before.
_LEAST_SCALE = 2.0**-14


class Learner:
    """A network in training on this process, and what trains it.

    data: the images to train on, all of them on every rank.

    Raises UserError for what does not fit together: data, model, ranks, precision.
    """

    def __init__(self, config: Config, accelerator: Accelerator, data: Dataset) -> None:
        self.config, self.accelerator, self._data = config, accelerator, data
        train = config.train
        self.stages = Stages(config.stages, data, accelerator.num_processes)
        check_parts(config)
        on_cpu = accelerator.device.type == "cpu"
        graphs.check_graphs(train.compile, on_cpu)
        self.method = build_method(config.method, self._task())
        if data.extra:
            check_rows(self.method)
        # One network trains; the other is its plain fp32 copy, which is evaluated and saved.
        start = read_start(config, data)
        self.started_from = start.sha256 if start else None
        network = self._build(start)
        self.copy = copy.deepcopy(network)
        subject = f"model.name: {config.model.name}"
        for shape in self._shapes():
            check_answers(self.copy, subject, shape, len(data.classes))
            another = copy.deepcopy(self.copy)
            check_answers(another, subject, shape, len(data.classes), training=True)
            check_strides(accelerator, self.copy, shape)
        check_statistics(min(stage.smallest_share for stage in self.stages.all), network)
        if train.sync_batchnorm and not has_batchnorm(network):
            raise UserError("train.sync_batchnorm: the network has no BatchNorm; use false")
        if train.sync_batchnorm and "double backward" in self.method.needs:
            raise UserError(
                f"train.sync_batchnorm: {config.method.name} differentiates a gradient, which "
                f"torch's SyncBatchNorm cannot; use false, or model.norm=group"
            )
        trained = synchronised(accelerator, network) if train.sync_batchnorm else network
        compile_network(trained, train.compile, "kept graph" in self.method.needs)
        records = train.compile in graphs.RECORDED and not on_cpu
        self.skipped_graphs = graphs.SkippedGraphs() if records else None
        self.net = engines.prepare(accelerator, trained, config)
        self.nonfinite = NonFinite(
            self.net.bare,
            self.net.skippable,
            self.net.flag_nonfinite,
            train.on_nan,
            scaled=accelerator.scaler is not None,
        )
        self.average = Average(copy.deepcopy(self.copy), self.net) if config.average else None
        self.net.average = self.average.network if self.average else None
        self.perturbation = (
            WeightPerturbation(accelerator, self.net, config.awp.gamma) if config.awp else None
        )
        self.clock, self.skipped = Clock(), 0
        self._begin(self.stages.at(0))

    def _task(self) -> Task:
        data, smoothing = self._data, self.config.train.label_smoothing
        return Task(
            loss=partial(F.cross_entropy, label_smoothing=smoothing),
            samples=len(data),
            shape=torch.Size(data.images.shape[1:]),
            classes=len(data.classes),
            device=self.accelerator.device,
        )

    def _shapes(self) -> set[torch.Size]:
        """Return (C, H, W) of the images of each stage. Raises UserError where they have one."""
        shape = self._data.images.shape[1:]
        if not self.config.resizes:
            return {torch.Size(shape)}
        if self._data.extra:
            raise UserError("data.size: data.extra's images have one size; leave one of them out")
        check_pictures(self.method, shape)
        framed = (self._data.framed(stage.config.data) for stage in self.stages.all)
        return {torch.Size(data.images.shape[1:]) for data in framed}

    def enter(self, epoch: int) -> None:
        """Make ready for an epoch, counted from 0. Every rank calls this."""
        stage = self.stages.at(epoch)
        if stage is self.stage:
            return
        before = self.loader.batch_size, self.data.images.shape[1:]
        del self.loader  # whose images take memory, before the next one's do
        self._begin(stage)
        if before == (self.loader.batch_size, self.data.images.shape[1:]):
            return
        for each in self.method.carried().values():
            if isinstance(each, ByPosition):
                each.rows = None  # of batches of another size
        if self.config.train.compile != "none":
            torch.compiler.reset()  # code for another size takes memory

    def _begin(self, stage: Stage) -> None:
        """Take the images, batches, ball and attack of a stage."""
        self.stage, config = stage, stage.config
        self.data = self._data.framed(config.data) if self.config.resizes else self._data
        self.loader = Loader(
            self.data,
            config.train.batch_size,
            config.train.seed,
            self.accelerator.device,
            config.data.augment,
            config.data.drop_last,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            config.data.augmentation(),
        )
        self.threat = build_threat(config.threat.norm, config.threat.eps)
        self.method.options = config.method
        if self.average and config.average:
            steps = config.average.epochs * stage.batches * self.method.steps_per_batch
            self.average.decay = max(0.0, 1 - 1 / steps)

    def _build(self, start: Start | None) -> Classifier:
        data = self._data
        mean, std = start.normalisation if start else data.statistics()
        model = build_model(
            self.config.model,
            mean,
            std,
            data.classes,
            self.config.train.seed,
            data.images.shape[2:],
            pretrained=start is None,
        )
        if start:
            start.put_into(model)
        return model.to(self.accelerator.device)

    @property
    def total_steps(self) -> int:
        """Optimiser steps that the schedule spans: epochs x batches x replays, or max_steps."""
        train, per_batch = self.config.train, self.method.steps_per_batch
        planned = round(self.stages.batches_until(train.epochs)) * per_batch
        if train.max_steps is None:
            return planned
        return min(planned, math.ceil(train.max_steps / per_batch) * per_batch)

    @property
    def epochs(self) -> float:
        """Epochs so far, replays not counted."""
        return self.clock.epochs(self.loader.batches)

    @property
    def progress(self) -> float:
        """The share of the schedule that is done."""
        return self.clock.step / self.total_steps

    def settle(self) -> None:
        """Prepare for the first step of a start (`network.settle`). Every rank calls this."""
        settle(self.accelerator, self.net, self.data)

    def learn(self, batch: Batch, meter: Meter) -> None:
        """Take one optimiser step for each of the method's objectives; wait for no device."""
        batch = replace(batch, when=replace(batch.when, progress=self.progress))
        # For layers that draw (dropout, stochastic depth), so that a run goes on bit for bit.
        seed = rng.stream_key("layers", batch.when.key, self.accelerator.process_index)
        torch.manual_seed(seed & (2**63 - 1))
        graphs.begin_batch(self.config.train.compile)
        threat = self.threat.at(self._warmth(self.config.threat.warmup, batch.when))
        parts = batch.parts(self.config.train.accumulate)
        steps = [checked_steps(self.method, self.net, part, threat) for part in parts]
        for objectives in zip(*steps, strict=True):
            self._set_lr_and_momentum()
            shares = [(each, part.weight) for each, part in zip(objectives, parts, strict=True)]
            with self._perturbed(shares, batch.when):
                losses = self._backward(objectives, parts, meter)
            if self.config.optim.clip:
                self.net.clip_gradients(self.config.optim.clip)
            self.nonfinite.before_update(losses)
            self.net.optimizer.step()
            self.net.optimizer.zero_grad()
            if self.average:
                self.average.update(self.clock.step)
            self.clock.step += 1

    def _backward(
        self, objectives: Sequence[Objective], parts: Sequence[Batch], meter: Meter
    ) -> Tensor:
        """Add up the gradients of a batch's parts, sent with the last; return the sum of losses."""
        losses = []
        for number, (objective, part) in enumerate(zip(objectives, parts, strict=True), 1):
            last = number == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.net.prepared):
                out = objective()
                self.net.backward(out.loss, self.nonfinite.mark(out.loss, part.weight))
            meter.add(out, part.labels)
            losses.append(out.loss.detach())
        return sum(losses[1:], start=losses[0])

    def _perturbed(
        self, shares: Sequence[tuple[Objective, float]], when: When
    ) -> AbstractContextManager[None]:
        awp = self.config.awp
        if self.perturbation is None or awp is None or when.epoch < awp.start:
            return nullcontext()
        return self.perturbation.worst_weights_nearby(shares)

    @staticmethod
    def _warmth(epochs: float, when: When) -> float:
        """Return the share that a batch has of what grows over the first `epochs`; 1 from there."""
        batches = epochs * when.batches
        return min(1.0, (when.epoch * when.batches + when.batch + 1) / batches) if batches else 1.0

    def lr_and_momentum(self, step: int) -> tuple[float, float]:
        """Return those of an optimiser step, counted from 0."""
        optim, total, per_batch = self.config.optim, self.total_steps, self.method.steps_per_batch
        warmup = self.stages.batches_until(optim.warmup) * per_batch
        epoch = self.stages.epochs_after(step / per_batch)
        shape = optim.rise, warmup, optim.milestones, optim.floor, optim.points, epoch
        return (
            lr_at(optim.schedule, optim.lr, step, total, *shape),
            momentum_at(optim.momentum, optim.cycle_momentum, step, total, optim.rise),
        )

    def _set_lr_and_momentum(self) -> None:
        """Before the backward pass: some engines take the step inside it."""
        lr, momentum = self.lr_and_momentum(self.clock.step)
        set_rates(self.net.optimizer, lr, momentum)

    def update_copy(self) -> None:
        """Put the weights that are to be judged into `copy`. Every rank calls this.

        Those in training, or their average; BatchNorm's statistics averaged over ranks.
        """
        if self.average is None:
            snapshot(self.accelerator, self.net, self.copy)
        else:
            self.average.copy_into(self.accelerator, self.copy)

    def raw_copy(self) -> Classifier:
        """Return another network with the weights in training. Every rank calls this."""
        raw = copy.deepcopy(self.copy)
        snapshot(self.accelerator, self.net, raw)
        return raw

    def check_graphs(self) -> None:
        """Warn of passes that `train.compile` was to replay as CUDA graphs, and does not."""
        if self.skipped_graphs and (news := self.skipped_graphs.news()):
            log.warning("train.compile: %s", news)

    def check_updates(self) -> None:
        """Warn of skipped updates; raise RunFailure, on every rank, where they end the run."""
        scaler = self.accelerator.scaler
        if scaler and (scale := scaler.get_scale()) < _LEAST_SCALE:
            raise RunFailure(
                f"gradients in fp16 are not finite at any loss scale (it has fallen to {scale:.1g} "
                f"at optimiser step {self.clock.step}): no update is taken; try "
                f"train.precision=fp32"
            )
        trouble = self.nonfinite.trouble(self.accelerator)
        if trouble is None or trouble.count == self.skipped:
            return
        step = self.clock.step - self.nonfinite.seen + trouble.first
        number = (step - 1) // self.method.steps_per_batch
        epoch = int(self.stages.epochs_after(number))
        batch = round(number - self.stages.batches_until(epoch))
        ranks = ", ".join(map(str, trouble.ranks))
        what = f"the loss of rank {ranks}" if ranks else "a gradient"
        where = f"at optimiser step {step} (epoch {epoch + 1}, batch {batch + 1})"
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
