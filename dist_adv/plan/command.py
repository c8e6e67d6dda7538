"""`dist-adv plan`: from a configuration and step times to a table of what N GPUs would take."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_adv import files
from dist_adv.bench import about
from dist_adv.by_epoch import told
from dist_adv.config import Config
from dist_adv.data.datasets import NAMES
from dist_adv.distributed import launched
from dist_adv.distributed.start import precision_of, start_accelerator
from dist_adv.errors import UserError
from dist_adv.plan.measure import (
    SETS,
    Images,
    count_images,
    measure_link,
    measure_steps,
    without_validation,
    works_of,
)
from dist_adv.plan.model import Cluster, Link, Row, StepTime, Work, predict, total
from dist_adv.plan.record import plan_record, read_step_times
from dist_adv.terminal import bar, start_logging
from dist_adv.text import duration

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
    works, cluster = works_of(config, images, asked.weak), _cluster(asked)
    # What cannot be planned is refused before anything is measured.
    draft = [predict(work, cluster or Cluster(Link(math.inf)), n) for work in works for n in gpus]
    points, source = _given(config, images, asked)
    if not points or not cluster:
        accelerator = start_accelerator(config.train.precision, config.train.threads)
        start_logging(accelerator.is_main_process)
        if not cluster:
            cluster = Cluster(measure_link(accelerator))
            if accelerator.device.type == "cpu":  # whose cores compute and send
                works = [replace(work, overlap=False) for work in works]
        if not points:
            sizes = _sizes([-(-row.local_batch // config.train.accumulate) for row in draft])
            with bar(accelerator.is_main_process) as progress:
                task = progress.add_task("measuring", total=len(sizes) * (_ROUNDS + 1), status="")
                tick = partial(progress.advance, task)
                points = measure_steps(config, images, sizes, accelerator, _ROUNDS, tick=tick)
            precision = precision_of(accelerator)
            source = about(accelerator.device, precision)
        if not accelerator.is_main_process:
            return
    step = StepTime.fit(points, works[-1].step.cost)
    works = [work.timed(step) for work in works]
    parts = [[predict(work, cluster, n) for work in works] for n in gpus]
    rows, console = [total(each) for each in parts], Console()
    for title, of_part in zip(_titles(config), zip(*parts, strict=True), strict=True):
        if title:
            console.print(title, highlight=False, markup=False)
        console.print(_table(of_part, asked.price, whole=not title))
    if len(works) > 1:
        console.print("all epochs")
        console.print(_sum(rows, asked.price))
    for line in _assumptions(config, works[-1], cluster, points, source):
        console.print(line, highlight=False, markup=False)
    if any(work.area != 1 for work in works):
        console.print("Steps of other image sizes are taken to need time by the area of an image.")
    if file:  # last, so that a disk that refuses it leaves what was printed
        record = plan_record(config, images, points, source, rows)
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
    """Return None where the link is to be measured: under a launcher, without --bandwidth."""
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
            raise UserError(
                f"--images, --classes: only of a folder or a pack; {data.name} is known"
            )
        images = SETS[data.name]
    elif data.name not in NAMES:
        images = count_images(data)
    elif not (asked.images and asked.classes and data.size):
        raise UserError(
            f"--images, --classes and data.size: a plan does not read the files of {data.name}; "
            f"say how many and how large they are: --images 1281167 --classes 1000 data.size=224"
        )
    else:
        images = Images(asked.images, 3, (data.size, data.size), asked.classes)
    return without_validation(data, images)


def _sizes(shares: Sequence[int]) -> list[int]:
    """Batch sizes to measure: the ends of what is planned; at least two, or there is no line."""
    smallest, largest = max(2, min(shares)), max(2, *shares)
    return sorted({smallest if smallest < largest else max(2, largest // 2), largest})


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


def _titles(config: Config) -> list[str]:
    """Return what is said of each stage of a run; nothing where it has one."""
    stages, titles = list(config.stages), [""]
    if len(stages) > 1:
        ends = [*stages, config.train.epochs][1:]
        titles = [
            f"epochs {first + 1} to {end}: {told(config.changes, first)}"
            for first, end in zip(stages, ends, strict=True)
        ]
    return titles


def _table(rows: Sequence[Row], price: float | None, whole: bool = True) -> Table:
    """Return a column for each number of GPUs. whole: the rows are of a run and not of a part."""
    lines: dict[str, Callable[[Row], str]] = {
        "global batch": lambda row: f"{row.global_batch:,}",
        "images a GPU": lambda row: f"{row.local_batch:,}",
        "peak learning rate": lambda row: f"{row.lr:g}",
        "optimiser step, ms": lambda row: f"{1000 * row.step_s:.1f}",
        "all-reduce, ms": lambda row: f"{1000 * row.all_reduce_s:.1f}",
        "  of it not hidden, ms": lambda row: f"{1000 * row.exposed_s:.1f}",
        "an epoch": lambda row: duration(row.epoch_s),
        "the run" if whole else "these epochs": lambda row: duration(row.run_s),
        "sent by a GPU, a step, MB": lambda row: f"{row.sent_per_step / 1e6:,.1f}",
        "sent by a GPU, an epoch, GB": lambda row: f"{row.sent_per_epoch / 1e9:,.2f}",
        "images read a second, all": lambda row: f"{row.images_per_s:,.0f}",
        "efficiency": lambda row: f"{row.efficiency:.0%}",
        "GPU hours": lambda row: f"{row.gpu_hours:,.2f}",
    }
    if price is not None:
        lines["cost"] = lambda row: f"{row.gpu_hours * price:,.2f}"
    return _columns(rows, lines)


def _sum(rows: Sequence[Row], price: float | None) -> Table:
    """Return what all stages of a run take together."""
    lines = {
        "the run": lambda row: duration(row.run_s),
        "GPU hours": lambda row: f"{row.gpu_hours:,.2f}",
        **({"cost": lambda row: f"{row.gpu_hours * price:,.2f}"} if price is not None else {}),
    }
    return _columns(rows, lines)


def _columns(rows: Sequence[Row], lines: Mapping[str, Callable[[Row], str]]) -> Table:
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
    if work.parts > 1:
        yield f"That is of {work.parts} parts of a batch, one after another."
    megabytes = sum(work.buckets) / 1e6
    yield (
        f"Gradients: {megabytes:.1f} MB (fp32 in every precision) in {len(work.buckets)} "
        f"bucket(s), one all-reduce an optimiser step, {work.steps_per_batch} step(s) a batch; an "
        f"attack sends nothing. A step is {step.cost.passes:g} passes, natural training's 3."
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
