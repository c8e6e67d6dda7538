"""`dist-adv plan`: from a configuration and step times to a table of what N GPUs would take."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dist_adv import files
from dist_adv.attacks import frozen
from dist_adv.attacks.threat import build as build_threat
from dist_adv.bench import about
from dist_adv.bench.timing import alternate, network, noise
from dist_adv.config import Config
from dist_adv.data import Batch, DataOptions
from dist_adv.data.loader import split
from dist_adv.distributed import launched
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.network import settle
from dist_adv.distributed.start import start_accelerator
from dist_adv.errors import UserError
from dist_adv.methods import build_method
from dist_adv.models import build_model
from dist_adv.plan import Cluster, Link, Row, StepTime, Work, buckets, predict, sent
from dist_adv.terminal import bar, start_logging
from dist_adv.text import duration
from dist_adv.train import Meter, Trainer, check_statistics

# Line rates in one direction, of a GPU or of one port; the latency of a message is what NCCL's
# own model of a ring takes for that hardware. Sources in docs/scaling.md.
LINKS = {
    "nvlink4": Link(450e9, 3.4e-6),
    "nvlink3": Link(300e9, 3.4e-6),
    "pcie5": Link(63e9, 5.7e-6),
    "pcie4": Link(31.5e9, 5.7e-6),
    "pcie3": Link(15.75e9, 5.7e-6),
    "ib-ndr": Link(50e9, 14e-6),
    "ib-hdr": Link(25e9, 14e-6),
    "ethernet-100": Link(12.5e9, 14e-6),
    "ethernet-10": Link(1.25e9, 14e-6),
}


_ROUNDS = 5  # of timed steps


@dataclass(frozen=True)
class Images:
    """The training split, as far as a plan needs it."""

    n: int
    channels: int
    size: int
    classes: int


SETS = {
    "cifar10": Images(50_000, 3, 32, 10),
    "cifar100": Images(50_000, 3, 32, 100),
    "svhn": Images(73_257, 3, 32, 10),
    "digits": Images(1438, 1, 8, 10),
}


@dataclass(frozen=True)
class Asked:
    """What the command line says, as it stands there."""

    gpus: str
    bandwidth: str | None = None
    gpus_per_node: int | None = None
    node_bandwidth: str | None = None
    step_ms: str | None = None
    step_times: Path | None = None
    images: int | None = None
    classes: int | None = None
    weak: bool = False
    price: float | None = None
    json: Path | None = None


def run_plan(config: Config, asked: Asked) -> None:
    """Print the table; write what `--step-times` reads. Under a launcher measure the link, too.

    Raises UserError for options that do not fit together or the configuration.
    """
    gpus = _numbers(asked.gpus)
    # Measured once and perhaps elsewhere: not even an earlier plan is overwritten.
    file = asked.json and files.output_file(asked.json, "--json", lambda content: False)
    images = _images(config, asked)
    work = work_of(config, images, asked.weak)
    cluster = _cluster(asked)
    # What cannot be planned is refused before anything is measured.
    draft = [predict(work, cluster or Cluster(Link(math.inf)), n) for n in gpus]
    points, source = _given(config, images, asked)
    if not points or not cluster:
        accelerator = start_accelerator(config.train.precision, config.train.threads)
        start_logging(accelerator.is_main_process)
        if not cluster:
            cluster = Cluster(measure_link(accelerator))
            # Ranks on CPUs compute and send with the same cores.
            work = replace(work, overlap=work.overlap and accelerator.device.type == "cuda")
        if not points:
            sizes = _sizes([row.local_batch for row in draft])
            with bar(accelerator.is_main_process) as progress:
                task = progress.add_task("measuring", total=len(sizes) * (_ROUNDS + 1), status="")
                tick = partial(progress.advance, task)
                points = measure_steps(config, images, sizes, accelerator, _ROUNDS, tick=tick)
            precision = accelerator.mixed_precision.replace("no", "fp32")
            source = about(accelerator.device, precision)
        if not accelerator.is_main_process:
            return
    work = replace(work, step=StepTime.fit(points, work.step.attack_passes))
    rows = [predict(work, cluster, n) for n in gpus]
    console = Console()
    console.print(_table(rows, asked.price))
    for line in _assumptions(config, work, cluster, points, source):
        console.print(line, highlight=False, markup=False)
    if file:  # last, so that a disk that refuses it leaves what was printed
        record = _record(config, images, points, source, rows)
        files.replace(file, json.dumps(record, indent=1).encode())


def _numbers(text: str) -> list[int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if 0 in numbers:
        raise UserError(f"--gpus: {text!r} is no list of numbers of GPUs; write 8,64,512")
    return sorted(set(numbers))


def _pair(option: str, text: str, example: str) -> tuple[float, float]:
    """`12.5:14`; the second is 0 where it is not given."""
    first, _, second = text.partition(":")
    try:
        pair = float(first), float(second or 0)
    except ValueError:
        pair = 0.0, 0.0
    if not (0 < pair[0] < math.inf and 0 <= pair[1] < math.inf):
        raise UserError(f"{option}: {text!r} is not understood; write {example}")
    return pair


def _link(option: str, text: str) -> Link:
    if text in LINKS:
        return LINKS[text]
    example = f"GB/s or GB/s:MICROSECONDS, such as 12.5:14, or one of {', '.join(LINKS)}"
    bandwidth, latency = _pair(option, text, example)
    return Link(1e9 * bandwidth, 1e-6 * latency)


def _cluster(asked: Asked) -> Cluster | None:
    """None where the link is to be measured: under a launcher, without --bandwidth."""
    if (asked.gpus_per_node is None) != (asked.node_bandwidth is None):
        raise UserError("--gpus-per-node and --node-bandwidth: give both, or none for one ring")
    if asked.bandwidth is None:
        if launched.ranks() == 1 or asked.node_bandwidth:
            raise UserError(
                f"--bandwidth: missing; give GB/s or one of {', '.join(LINKS)}, or measure it: "
                f"torchrun --nproc-per-node N -m dist_adv plan ..."
            )
        return None
    link = _link("--bandwidth", asked.bandwidth)
    if asked.node_bandwidth is None:
        return Cluster(link)
    return Cluster(link, asked.gpus_per_node, _link("--node-bandwidth", asked.node_bandwidth))


def _images(config: Config, asked: Asked) -> Images:
    data = config.data
    if data.name in SETS:
        if asked.images or asked.classes:
            raise UserError(f"--images, --classes: only of an imagefolder; {data.name} is known")
        images = SETS[data.name]
    elif not (asked.images and asked.classes and data.size):
        raise UserError(
            f"--images, --classes and data.size: a plan does not read the files of {data.name}; "
            f"say how many and how large they are: --images 1281167 --classes 1000 data.size=224"
        )
    else:
        images = Images(asked.images, 3, data.size, asked.classes)
    return without_validation(data, images)


def without_validation(data: DataOptions, images: Images) -> Images:
    """Those that are trained on. Raises UserError where there are none."""
    if data.validation >= images.n:
        raise UserError(f"data.validation: {data.validation} images to hold out of {images.n}")
    return replace(images, n=images.n - data.validation)


def work_of(config: Config, images: Images, weak: bool = False) -> Work:
    """Everything but the step time, of which only the passes of the attack are known yet.

    `predict` then raises UserError for a batch size that the images do not fit.
    """
    train = config.train

    def batches(batch: int, gpus: int) -> int:
        if weak and batch > images.n:
            raise UserError(
                f"--weak: {gpus} x {train.batch_size} is a batch of {batch} of {images.n} images; "
                f"use fewer GPUs or a smaller train.batch_size"
            )
        number, smallest = split(images.n, batch, config.data.drop_last, gpus)
        check_statistics(config, smallest)
        return number

    steps, attack_passes = count_passes(config)
    return Work(
        StepTime(0.0, 1.0, attack_passes),
        gradient_buckets(config, images),
        train.batch_size,
        train.epochs,
        steps,
        config.optim.lr,
        batches,
        train.max_steps,
        overlap=train.compile == "none",  # see parallel.compile_network
        weak=weak,
    )


def gradient_buckets(config: Config, images: Images) -> list[int]:
    """Bytes of each of DDP's all-reduces in a step, in fp32; the last layer's come first."""
    with torch.device("meta"):
        grey = [0.5] * images.channels
        model = build_model(config.model, grey, grey, ["?"] * images.classes, config.train.seed)
    return buckets([4 * parameter.numel() for parameter in reversed(list(model.parameters()))])


class _Counted:
    """A network of one layer, as methods see it, that counts its forward passes."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        self.passes = 0
        self.model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)

    def frozen(self) -> AbstractContextManager[nn.Module]:
        return frozen(self.model)


def count_passes(config: Config) -> tuple[int, float]:
    """(optimiser steps of a batch, passes of the attack in each), counted and not known."""
    net, two = _Counted(), torch.arange(2)
    batch = Batch(torch.full((2, 1, 2, 2), 0.5), two, two, 1.0)
    steps = 0
    threat = build_threat(config.threat.norm, config.threat.eps)
    for step in build_method(config.method, threat).steps(net, batch):
        step.loss.backward()
        steps += 1
    return steps, net.passes / steps - 1


def _sizes(shares: Sequence[int]) -> list[int]:
    """Batch sizes to measure: the ends of what is planned; at least two, or there is no line."""
    smallest, largest = max(2, min(shares)), max(2, *shares)
    return sorted({smallest if smallest < largest else max(2, largest // 2), largest})


def measure_steps(
    config: Config,
    images: Images,
    sizes: Sequence[int],
    accelerator: Accelerator,
    rounds: int,
    communicate: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> dict[int, float]:
    """Seconds of an optimiser step of this rank by its batch size, its gradients kept or sent.

    `tick` is called len(sizes) * (rounds + 1) times.
    """
    sides: dict[str, Callable[[], None]] = {}
    with plain_failures(accelerator, "train.batch_size", config.train.batch_size):
        for size in sizes:
            batch_size = size * accelerator.num_processes
            train = config.train.model_copy(update={"batch_size": batch_size})
            data = config.data.model_copy(update={"validation": 0})
            some = noise(batch_size, images.size, images.classes, images.channels)
            trainer = Trainer(
                config.model_copy(update={"train": train, "data": data}), accelerator, (some, some)
            )
            settle(accelerator, trainer.net, some)
            batch = next(trainer.loader.epoch(0))
            learn = partial(trainer.learn, batch, Meter(accelerator.device))
            sides[str(size)] = learn if communicate else partial(_alone, trainer, learn)
        timings = alternate(sides, accelerator.device, rounds, tick=tick)
    per_batch = count_passes(config)[0]
    return {size: timings.median(str(size)) / per_batch for size in sizes}


def _alone(trainer: Trainer, learn: Callable[[], None]) -> None:
    with trainer.accelerator.no_sync(trainer.net.prepared):
        learn()


def time_all_reduce(accelerator: Accelerator, size: int, rounds: int = 15) -> float:
    """Seconds of an all-reduce of `size` bytes over the ranks: the median."""
    numbers = torch.zeros(size // 4, device=accelerator.device)
    sides = {"reduce": lambda: dist.all_reduce(numbers)}
    return alternate(sides, accelerator.device, rounds, warm_up=3).median("reduce")


def measure_link(accelerator: Accelerator) -> Link:
    """The link that makes the ring formula true for two sizes, over the ranks at hand."""
    ranks, (small, large) = accelerator.num_processes, (2**16, 2**24)
    latency, long = (time_all_reduce(accelerator, size) for size in (small, large))
    bandwidth = sent(large - small, ranks) / max(long - latency, 1e-9)
    rest = latency - sent(small, ranks) / bandwidth
    return Link(bandwidth, max(0.0, rest / (2 * (ranks - 1))))


def _given(config: Config, images: Images, asked: Asked) -> tuple[dict[int, float], dict[str, Any]]:
    """Step times by batch size that need not be measured, and where they come from."""
    if asked.step_ms and asked.step_times:
        raise UserError("--step-ms and --step-times: give one of them")
    if asked.step_times:
        return read_step_times(asked.step_times, config, images)
    points = {}
    for text in asked.step_ms.split(",") if asked.step_ms else ():
        example = "BATCH:MILLISECONDS, such as 128:35.5 or 16:9,128:35.5"
        batch, milliseconds = _pair("--step-ms", text, example)
        if batch != int(batch) or not milliseconds:
            raise UserError(f"--step-ms: {text!r} says no batch and time; write {example}")
        points[int(batch)] = milliseconds / 1000
    return points, {"hardware": "given by hand"}


def _label(config: Config) -> str:
    """The method's name in benchmarks."""
    method = config.method
    names = {"free": "Free", "fast": "Fast"}
    return f"PGD-{method.steps}" if method.name == "pgd" else names.get(method.name, method.name)


_CASE = re.compile(r"([\w-]+)[^,]*, (\w+), batch (\d+), compile (\w+)")


def _cases(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, int, float]]:
    """(method, precision, compile, batch size, seconds) of each step time of a record."""
    for row in rows:
        timed = {**row, **row.get("details", {})}
        case = _CASE.fullmatch(timed["what"])
        if case and "step_ms" in timed:
            method, precision, batch, compile_ = case.groups()
            if not (int(batch) and 0 < timed["step_ms"] < math.inf):
                raise ValueError(timed["step_ms"])
            yield method, precision, compile_, int(batch), timed["step_ms"] / 1000


def read_step_times(
    path: Path, config: Config, images: Images
) -> tuple[dict[int, float], dict[str, Any]]:
    """Of this configuration's method, precision and network, from `bench.json`, part b of
    `benchmarks/gpu_suite.py`, or `plan --json`; and what the record says of itself.

    Raises UserError for a file that is none of these, or lacks the case.
    """
    try:
        record = json.loads(path.read_text())
        cases, measured = list(_cases(record["rows"])), record["network"]
    except OSError as error:
        raise UserError(f"--step-times: {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"--step-times: {path}: holds no step times; use bench.json of dist-adv bench, b.json "
            f"of benchmarks/gpu_suite.py, or a file of dist-adv plan --json"
        ) from None
    wanted = network(config.model, images.size)
    if measured != wanted:
        raise UserError(f"--step-times: {path}: was measured with {measured}, not with {wanted}")
    label, train = _label(config), config.train
    found = [case for case in cases if case[0] == label and case[2] == train.compile]
    order = ("bf16", "fp16", "fp32") if train.precision == "auto" else (train.precision,)
    for precision in order:
        points = {batch: seconds for _, p, _, batch, seconds in found if p == precision}
        if points:
            return points, {**record, "precision": precision}
    there = sorted(
        {f"{method} {precision} {compile_}" for method, precision, compile_, *_ in cases}
    )
    raise UserError(
        f"--step-times: {path}: has no {label} in train.precision={train.precision} with "
        f"train.compile={train.compile}; it has {', '.join(there) or 'none'}"
    )


def _record(
    config: Config,
    images: Images,
    points: Mapping[int, float],
    source: Mapping[str, Any],
    rows: Sequence[Row],
) -> dict[str, Any]:
    keys = ("hardware", "precision", "torch", "date", "commit")
    case = f"{_label(config)}, {source.get('precision', config.train.precision)}"
    return {
        **{key: source[key] for key in keys if key in source},
        "network": network(config.model, images.size),
        "rows": [
            {
                "what": f"{case}, batch {batch}, compile {config.train.compile}",
                "step_ms": 1000 * seconds,
            }
            for batch, seconds in points.items()
        ],
        "plan": [asdict(row) for row in rows],
    }


def _table(rows: Sequence[Row], price: float | None) -> Table:
    """A column for each number of GPUs."""
    lines: dict[str, Callable[[Row], str]] = {
        "global batch": lambda row: f"{row.global_batch:,}",
        "images a GPU": lambda row: f"{row.local_batch:,}",
        "peak learning rate": lambda row: f"{row.lr:g}",
        "optimiser step, ms": lambda row: f"{1000 * row.step_s:.1f}",
        "all-reduce, ms": lambda row: f"{1000 * row.all_reduce_s:.1f}",
        "  of it not hidden, ms": lambda row: f"{1000 * row.exposed_s:.1f}",
        "a pass": lambda row: duration(row.pass_s),
        "the run": lambda row: duration(row.run_s),
        "sent by a GPU, a step, MB": lambda row: f"{row.sent_per_step / 1e6:,.1f}",
        "sent by a GPU, a pass, GB": lambda row: f"{row.sent_per_pass / 1e9:,.2f}",
        "images read a second, all": lambda row: f"{row.images_per_s:,.0f}",
        "efficiency": lambda row: f"{row.efficiency:.0%}",
        "GPU hours": lambda row: f"{row.gpu_hours:,.2f}",
    }
    if price is not None:
        lines["cost"] = lambda row: f"{row.gpu_hours * price:,.2f}"
    table = Table("GPUs")
    for row in rows:
        table.add_column(f"{row.gpus:,}", justify="right")
    for name, cell in lines.items():
        table.add_row(name, *map(cell, rows))
    return table


def _assumptions(
    config: Config,
    work: Work,
    cluster: Cluster,
    points: Mapping[int, float],
    source: Mapping[str, Any],
) -> Iterator[str]:
    step = work.step
    measured = ", ".join(f"{1000 * s:.1f} ms at {b}" for b, s in sorted(points.items()))
    about = ", ".join(
        str(source[key]) for key in ("hardware", "precision", "date", "commit") if key in source
    )
    floor = f"{1000 * step.fixed:.1f} ms + {1000 * step.per_image:.3f} ms an image"
    yield f"Step time of one GPU: {measured} images ({about}), taken as {floor}."
    if len(points) == 1:
        yield "One batch size tells no floor: small shares of a batch will take longer than this."
    megabytes = sum(work.buckets) / 1e6
    yield (
        f"Gradients: {megabytes:.1f} MB (fp32 in every precision) in {len(work.buckets)} "
        f"bucket(s), one all-reduce an optimiser step, {work.steps_per_batch} step(s) a batch; the "
        f"attack ({step.attack_passes:g} pass(es) a step) sends nothing."
    )
    yield (
        f"They travel during the training pass's backward, {step.backward_share:.0%} of the step; "
        f"the last bucket follows it."
        if work.overlap
        else "They travel after the backward pass: with train.compile DDP waits for all of it, and "
        "on CPUs the same cores compute and send."
    )
    yield f"All-reduce: {_shown(cluster)}, all of that bandwidth used and shared with nobody."
    if config.train.sync_batchnorm:
        yield "Not counted: train.sync_batchnorm's messages at every BatchNorm, in attacks too."
    yield (
        "Not counted: evaluation, checkpoints, start, reading images, ranks that wait for slower "
        "ones; a short last batch counts as a full one. Efficiency is against one GPU with "
        f"a batch of {work.batch:,}."
    )


def _shown(cluster: Cluster) -> str:
    def one(link: Link) -> str:
        return f"{link.bandwidth / 1e9:.4g} GB/s and {1e6 * link.latency:.3g} us a message"

    if cluster.network is None:
        return f"a ring of all GPUs, {one(cluster.link)}"
    return (
        f"rings of the {cluster.per_node} GPUs of a node, {one(cluster.link)}, then of the nodes, "
        f"{one(cluster.network)} of a node"
    )
