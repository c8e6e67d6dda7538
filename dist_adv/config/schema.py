"""The sections of a configuration, each with its keys, their types and defaults."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from dist_adv import plugins
from dist_adv.attacks.spec import attack_kind, parse_attack
from dist_adv.by_epoch import Changes, with_values
from dist_adv.config.yaml_text import to_yaml
from dist_adv.data.datasets import DataChoice, DataOptions
from dist_adv.methods import MethodChoice, find_method
from dist_adv.models import ModelChoice, PreActResNet18Options
from dist_adv.options import Options, PositiveInt, Real, Share, StepSize
from dist_adv.text import nearest

SCHEDULE_GROUP = "dist_adv.schedules"
TRACKER_GROUP = "dist_adv.trackers"
SCHEDULES = ("cyclic", "multistep", "cosine", "linear", "constant")
Minutes = Annotated[Real, Field(gt=0)]

_MAX_EPS = {"linf": 1.0, "l2": 8.0}


class ThreatOptions(Options):
    """The ball of the adversary; `eps` in pixel units of [0, 1]."""

    norm: Literal["linf", "l2"] = "linf"
    eps: Real = 8 / 255
    warmup: Annotated[Real, Field(ge=0)] = 0.0
    """Epochs in which the ball of training grows from nothing to eps, and attacks' steps with it;
    what is measured is measured at eps."""

    @model_validator(mode="after")
    def _pixel_units(self) -> "ThreatOptions":
        if self.eps < 0:
            raise ValueError(f"eps: {self.eps:g} is negative; a radius is 0 or more, like 8/255")
        if self.eps >= _MAX_EPS[self.norm]:
            raise ValueError(
                f"eps: {self.eps:g} is too large a radius in pixel units of [0, 1]; "
                f"did you mean {self.eps:g}/255?"
            )
        return self


_SCHEDULE = {"anyOf": [{"enum": list(SCHEDULES)}, {"type": "string", "pattern": ":"}]}


class OptimOptions(Options):
    """The optimiser and its schedule over all optimiser steps of the run.

    momentum: of SGD; of AdamW its first beta. decay_norms: false leaves norms and biases, whatever
    has one dimension, without weight decay. layer_decay: of timm's networks, by what the rate is
    multiplied from layer to layer, from the last one back. clip: the largest norm of all gradients
    together. rise: the share of the run in which the rate of `cyclic` rises; short runs like 0.25.
    milestones: the shares of the run at which `multistep` divides the rate by ten. points: of
    `linear`, the share of `lr` at some epochs, {0: 0, 2: 1, 6: 0.1}, with straight lines between
    them. warmup: epochs in which any rate but `cyclic` rises to what it would be. floor: the share
    of `lr` at which `cosine` ends. schedule: cyclic, multistep, cosine, linear, constant, or a
    reference to a function of the share of the run that is done, in [0, 1], to the share of `lr`.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[Real, Field(gt=0)] = 0.2
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    beta2: Annotated[Real, Field(ge=0, lt=1)] = 0.999
    weight_decay: Annotated[Real, Field(ge=0)] = 5e-4
    decay_norms: bool = True
    layer_decay: Annotated[Real, Field(gt=0, le=1)] = 1.0
    clip: Annotated[Real, Field(gt=0)] | None = None
    schedule: Annotated[str, WithJsonSchema(_SCHEDULE)] = "cyclic"
    rise: Annotated[Real, Field(gt=0, lt=1)] = 0.5
    milestones: list[Annotated[Real, Field(gt=0, lt=1)]] = [0.5, 0.75]
    points: dict[Annotated[Real, Field(ge=0)], Share] = {}
    warmup: Annotated[Real, Field(ge=0)] = 0.0
    floor: Share = 0.0
    cycle_momentum: bool = False
    """Momentum m -> m - 0.1 -> m over the run, as torch's CyclicLR does unless told otherwise."""

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        schedule = plugins.find(name, SCHEDULE_GROUP, dict.fromkeys(SCHEDULES, float))
        try:
            share = float(schedule(0.0))
        except Exception as error:
            raise ValueError(
                f"{name!r} is no function, or fails ({plugins.told(error)})"
            ) from error
        if not math.isfinite(share):
            raise ValueError(f"{name!r} gives {share} at the start; give a share of lr")
        return name

    @model_validator(mode="after")
    def _momentum_to_cycle(self) -> "OptimOptions":
        if self.cycle_momentum and self.momentum < 0.1:
            raise ValueError("cycle_momentum: needs a momentum of at least 0.1 to take 0.1 from")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov: is a way of SGD with momentum; use false")
        if self.floor and self.schedule != "cosine":
            raise ValueError(f"floor: is of cosine, and the schedule is {self.schedule}; use 0")
        if bool(self.points) != (self.schedule == "linear"):
            raise ValueError(
                f"points: {'are of linear' if self.points else 'missing'}, and the schedule is "
                f"{self.schedule}; give both: schedule=linear and points={{0: 0, 5: 1, 15: 0}}"
            )
        if self.warmup and self.schedule == "cyclic":
            raise ValueError("warmup: the cyclic rate rises by itself, for optim.rise; use 0")
        return self


class AverageOptions(Options):
    """An exponential average of the weights, which is evaluated, guarded and saved in their place.

    epochs: its horizon, the same at any batch size: an optimiser step's decay is 1 - 1 / (the
    steps of so many epochs), and smaller at first, so that the horizon is at most a ninth of the
    run so far. BatchNorm's statistics are averaged with the weights: taken anew from clean images
    they cost up to 10 points of robust accuracy
    (benchmarks/results/2026-11-27-averaged-batchnorm.md).
    """

    epochs: Annotated[Real, Field(gt=0)] = 4.0


class AWPOptions(Options):
    """Adversarial weight perturbation: a step's gradient is taken at the worst weights nearby.

    gamma: how far, as a share of each layer's norm; 0.01 for PGD, 0.005 for TRADES as published.
    start: epochs without it. It costs a forward and a backward pass, and a second all-reduce.
    """

    gamma: Annotated[Real, Field(gt=0, lt=1)] = 0.01
    start: Annotated[Real, Field(ge=0)] = 0.0


class TrainOptions(Options):
    """How long, how large, how precise.

    epochs: how often all images are seen (Free's replays come on top). batch_size: the global one.
    accumulate: in how many parts each rank takes its share of it, one after another: less memory,
    the same update, and gradients are sent once; but for BatchNorm, whose statistics are of a part.
    label_smoothing: s, of the training loss: the true class counts 1 - s + s / classes, each other
    s / classes; attacks go by the labels as they are, but those of `consistency`, `liet` and
    `sora`. max_steps: stop at the first batch boundary at or after this many optimiser steps; the
    schedule is fitted to it. log_every: batches between two lines of metrics. compile: `default`
    fuses the network's layers with torch.compile, which takes a minute or two at the start and a
    C++ compiler; `graphs`, on GPUs, replays whole passes as CUDA graphs, too; `max` does so there,
    and tunes longer first. Each size of batch is compiled: data.drop_last spares one.
    sync_batchnorm: BatchNorm's statistics are of the global batch instead of each rank's share (on
    GPUs). deterministic: cuDNN takes algorithms that give the same bits each time, so that a run
    on GPUs goes on bit for bit, too; false: the fastest, found out by timing them. CPUs always do.
    threads: CPU threads of a rank (null: the cores divided by the ranks). start: the folder of a
    run, an export or an import, or a model.safetensors, from whose weights and normalisation
    training starts (null: fresh weights).

    Checkpoints come at the end of every epoch, and every `save_steps` optimiser steps and every
    `save_minutes` (null: not); `keep` of them stay. max_minutes: save and leave after so long, to
    be started again. on_nan: an update whose loss or gradient is not finite is not taken; then
    the run stops, or skips up to `skip_limit` of them. timeout_minutes: a rank without progress
    for so long ends the run, saying where it hangs.
    """

    epochs: PositiveInt = 45
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    label_smoothing: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["none", "default", "graphs", "max"] = "none"
    sync_batchnorm: bool = False
    deterministic: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    max_steps: PositiveInt | None = None
    keep: PositiveInt = 2
    save_steps: PositiveInt | None = None
    save_minutes: Minutes | None = 10.0
    max_minutes: Minutes | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    skip_limit: PositiveInt = 10
    timeout_minutes: Minutes = 10.0
    log_every: PositiveInt = 50
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    start: str | None = None


def _check_options(name: str, kind: type[Options], given: dict[str, Any]) -> None:
    """Raise ValueError for options that somebody's own attack or tracker does not have."""
    try:
        kind.model_validate(given)
    except ValidationError as error:
        (detail, *_) = error.errors()
        key = ".".join(map(str, detail["loc"]))
        unknown = detail["type"] == "extra_forbidden"
        known = nearest(key, list(kind.model_fields)) if unknown else ""
        problem = f"unknown option{known}" if unknown else detail["msg"].lower()
        raise ValueError(f"of {name!r}: {key}: {problem}") from None


def _attack_names(names: list[str]) -> list[str]:
    for name in names:
        parse_attack(name)
    return names


class EvalOptions(Options):
    """What is measured, always in eval mode and fp32.

    attacks: of the final weights, on the whole test set (or `limit` images of it).
    every: after every so many epochs, the curve: natural, fgsm and `curve_attack` on
    `curve_limit` test images; 0 never. step_size: of PGD, in pixel units (null: eps / 4).
    batch_size: images a rank takes at once. compile: `default` fuses the network's layers with
    torch.compile: a minute at the start, then a quarter less time on CPUs; needs a C++ compiler.
    """

    attacks: list[str] = ["natural", "fgsm", "pgd-10", "pgd-20", "pgd-50"]
    limit: PositiveInt | None = None
    step_size: StepSize | None = None
    loss: Literal["ce", "margin", "dlr"] = "ce"
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: PositiveInt = 500
    compile: Literal["none", "default"] = "none"
    every: Annotated[int, Field(ge=0)] = 1
    curve_attack: str = "pgd-10"
    curve_limit: PositiveInt | None = 1000
    attack_options: dict[str, dict[str, Any]] = {}
    """Of somebody's own attacks, by their names in `attacks`."""

    @field_validator("attack_options")
    @classmethod
    def _options_fit(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, options in given.items():
            _check_options(name, attack_kind(name)[1], options)
        return given

    @field_validator("attacks")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        return _attack_names(names)

    @field_validator("curve_attack")
    @classmethod
    def _curve_known(cls, name: str) -> str:
        if parse_attack(name).kind != "pgd":
            raise ValueError(f"{name!r} has no PGD steps; use for example 'pgd-10'")
        return name


class WandbOptions(Options):
    """Weights & Biases. `auto` is online where a key is known and offline elsewhere.

    name: null is the run folder's name. tags: none is method, data set and model. W&B's own
    environment variables (WANDB_PROJECT, WANDB_RUN_GROUP, ...) go before what is said here.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: Annotated[str, Field(max_length=128, pattern=r"^[^/\\#?%:]+$")] = "dist-adv"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str = "train"
    notes: str | None = None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []


class TrackerOptions(Options):
    """The options of somebody's own tracker, with their defaults."""


class TrackOptions(Options):
    """Where metrics go besides metrics.jsonl and results.jsonl."""

    wandb: WandbOptions = WandbOptions()
    tensorboard: bool = False
    others: dict[str, dict[str, Any]] = {}
    """Trackers of somebody's own, by reference or entry point, with their options."""

    @field_validator("others")
    @classmethod
    def _trackers_fit(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, options in given.items():
            kind = plugins.find(name, TRACKER_GROUP, {})
            _check_options(name, plugins.options_of(name, kind, TrackerOptions), options)
        return given


class _File(Options):
    """What is kept whole in a file. NEEDS: the least that must be in it."""

    NEEDS: ClassVar[str]

    def dump(self) -> str:
        """Return the resolved configuration as YAML, which `load` reads back to the same."""
        return to_yaml(self.model_dump())


def _value(config: "Config", key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


class Config(_File):
    """A whole experiment, as it is in its last epoch (`by_epoch`)."""

    NEEDS: ClassVar[str] = "method: {name: fast}"

    method: MethodChoice
    threat: ThreatOptions = ThreatOptions()
    model: ModelChoice = PreActResNet18Options()
    data: DataChoice = DataOptions()
    optim: OptimOptions = OptimOptions()
    train: TrainOptions = TrainOptions()
    average: AverageOptions | None = None
    awp: AWPOptions | None = None
    eval: EvalOptions = EvalOptions()
    track: TrackOptions = TrackOptions()
    _changes: Changes = PrivateAttr(default_factory=dict)
    _stages: dict[int, "Config"] = PrivateAttr(default_factory=dict)

    @property
    def stages(self) -> dict[int, "Config"]:
        """What holds from which epoch on; itself from 0 where nothing is by epoch."""
        return self._stages or {0: self}

    @property
    def resizes(self) -> bool:
        """Whether images have another size in some epochs."""
        framings = {(each.data.size, each.data.shorter) for each in self.stages.values()}
        return len(framings) > 1

    @property
    def changes(self) -> Changes:
        """What is by epoch."""
        return self._changes

    def changing(self, changes: Changes, stages: "dict[int, Config]") -> "Config":
        """Return it as the last of these stages, which `changes` tells apart."""
        whole = self.model_copy()
        whole._stages = stages
        whole._changes = {
            key: {first: _value(stages[first], key) for first in values}
            for key, values in changes.items()
        }
        return whole

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return with_values(handler(self), self._changes)

    @model_validator(mode="after")
    def _method_that_can(self) -> "Config":
        method, name = find_method(self.method.name), self.method.name
        if self.threat.norm not in method.norms:
            raise ValueError(
                f"threat.norm: {name} is made for {' and '.join(method.norms)}, not for "
                f"{self.threat.norm}"
            )
        if "double backward" in method.needs and self.train.compile != "none":
            raise ValueError(
                f"train.compile: {name} differentiates a gradient, which compiled networks cannot; "
                f"use none"
            )
        points, epochs = self.optim.points, self.train.epochs
        if points and max(points) > epochs:
            raise ValueError(
                f"optim.points: goes to epoch {max(points):g} and train.epochs is {epochs}; give "
                f"points of this run, or train longer"
            )
        if "average" in method.needs and self.average is None:
            raise ValueError(f"average: {name} needs averaged weights; set average.epochs=4")
        return self

    @model_validator(mode="after")
    def _mixed_labels(self) -> "Config":
        if not self.data.augmentation().mixes:
            return self
        key = "mixup" if self.data.mixup else "cutmix"
        if not find_method(self.method.name).soft_labels:
            raise ValueError(
                f"data.{key}: makes labels probabilities, which {self.method.name} cannot learn "
                f"from; use 0, or another method"
            )
        if self.method.guard != "none" and self.method.guard_rule == "wong":
            raise ValueError(
                f"method.guard_rule: wong compares training batches, which data.{key} makes more "
                f"or less difficult; use gap"
            )
        return self

    def sources(self) -> dict[str, str]:
        """Return the hashes of the sources of whatever in it is somebody else's, by name."""
        names = [self.method.name, self.model.name, self.data.name, self.optim.schedule]
        return plugins.sources([*names, *self.eval.attacks, *self.track.others])


class Reference(Options):
    """A network as `--model` names it, and the arguments of the function that makes it."""

    reference: str
    args: dict[str, Any] = {}


class Judged(_File):
    """What is measured of somebody's network."""

    NEEDS: ClassVar[str] = "model: {reference: 'module:function'}"

    model: Reference
    threat: ThreatOptions = ThreatOptions()
    data: DataChoice = DataOptions()
    eval: EvalOptions = EvalOptions()

    def sources(self) -> dict[str, str]:
        """Return the hashes of the sources of whatever in it is somebody's own, by name."""
        return plugins.sources([self.model.reference, self.data.name, *self.eval.attacks])
