"""What a run would take on N GPUs: step times of one GPU, and the ring all-reduce formula.

Formulas only; `measure.py` finds out what goes into them and `command.py` prints what comes out.
Sizes are in bytes, times in seconds. docs/scaling.md says how to read the result.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dist_adv.errors import UserError
from dist_adv.methods.cost import Cost


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes a second, sent and received at the same time; latency: of one message."""

    bandwidth: float
    latency: float = 0.0

    def ring(self, size: float, ranks: int) -> float:
        """Seconds of a ring all-reduce: 2 (N - 1) messages of a part of N (Patarasuk 2009)."""
        return sent(size, ranks) / self.bandwidth + 2 * (ranks - 1) * self.latency


def sent(size: float, ranks: int) -> float:
    """Bytes that each rank sends, and receives, in an all-reduce of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


@dataclass(frozen=True)
class Cluster:
    """Nodes of `per_node` GPUs; without it every GPU is as far from every other.

    link: a GPU's, to the others of its node; network: a node's, which its GPUs share.
    """

    link: Link
    per_node: int | None = None
    network: Link | None = None

    def all_reduce(self, size: float, gpus: int) -> float:
        """Reduced within each node, each GPU's part between the nodes, then spread in the node.

        Raises UserError for nodes that are not full.
        """
        if self.per_node is None or self.network is None or gpus <= self.per_node:
            return self.link.ring(size, gpus)
        nodes, left = divmod(gpus, self.per_node)
        if left:
            raise UserError(
                f"--gpus: {gpus} does not fill nodes of {self.per_node}; use a multiple of it"
            )
        return self.link.ring(size, self.per_node) + self.network.ring(size, nodes)


@dataclass(frozen=True)
class StepTime:
    """One optimiser step of one GPU: fixed + per_image x images, without communication.

    cost: the passes in it.
    """

    fixed: float
    per_image: float
    cost: Cost

    @classmethod
    def fit(cls, seconds: Mapping[int, float], cost: Cost) -> "StepTime":
        """Fit a line through step times by batch size; through zero where there is one of them.

        A line that noise has tilted below zero is one through zero, too.
        """
        sizes, times = list(seconds), list(seconds.values())
        if len(sizes) > 1:
            slope, fixed = statistics.linear_regression(sizes, times)
            if fixed >= 0 and slope >= 0:
                return cls(fixed, slope, cost)
        slope, _ = statistics.linear_regression([0, *sizes], [0.0, *times], proportional=True)
        return cls(0.0, slope, cost)

    def seconds(self, images: float) -> float:
        return self.fixed + self.per_image * images

    def at_cost(self, cost: Cost) -> "StepTime":
        """Return the step of another method, by the number of its passes."""
        longer = cost.passes / self.cost.passes
        return StepTime(longer * self.fixed, longer * self.per_image, cost)

    def at_area(self, ratio: float) -> "StepTime":
        """Return the step on images of so many times as many pixels, as convolutions take it."""
        return StepTime(self.fixed, ratio * self.per_image, self.cost)

    def in_parts(self, parts: int) -> "StepTime":
        """Return the step whose images are taken in so many parts, one after another."""
        return StepTime(parts * self.fixed, self.per_image, self.cost)

    @property
    def backward_share(self) -> float:
        """Share of the step that is the training pass's backward, in which gradients can travel."""
        return self.cost.backward / self.cost.passes


_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # DDP's defaults


def buckets(sizes: Sequence[int]) -> list[int]:
    """How DDP parts gradients of these sizes, given in the order in which they become ready."""
    full: list[int] = []
    size = 0
    for gradient in sizes:
        size += gradient
        if size >= (_BUCKET if full else _FIRST_BUCKET):
            full.append(size)
            size = 0
    return [*full, size] if size else full


def exposed(parts: Sequence[int], backward: float, reduce: Callable[[float], float]) -> float:
    """Seconds that the all-reduces of the buckets go on after the backward pass.

    A bucket is ready when the backward pass has done its share of the bytes, and sent when the one
    before it has arrived. The last one is ready at the end, so it is never hidden.
    """
    ready = done = 0.0
    for size in parts:
        ready += backward * size / sum(parts)
        done = max(done, ready) + reduce(size)
    return done - backward


@dataclass(frozen=True)
class Work:
    """A run. batch: the global batch, or with `weak` a GPU's; overlap: gradients travel while the
    rest of the backward pass goes on; batches: of a pass, at a global batch and number of GPUs;
    area: of its images, against those that the step times are of; parts: in which a rank takes its
    share of a batch.
    """

    step: StepTime
    buckets: Sequence[int]
    batch: int
    epochs: int
    steps_per_batch: int
    lr: float
    batches: Callable[[int, int], int]
    max_steps: int | None = None
    overlap: bool = True
    weak: bool = False
    area: float = 1.0
    parts: int = 1

    def timed(self, step: StepTime) -> "Work":
        """Return it with step times of the last epochs of a run that it is a part of."""
        step = step.at_cost(self.step.cost).at_area(self.area).in_parts(self.parts)
        return replace(self, step=step)


@dataclass(frozen=True)
class Row:
    """A line of the table. efficiency: images a second of a GPU, against one GPU alone that takes
    the whole `Work.batch`.
    """

    gpus: int
    global_batch: int
    local_batch: int
    lr: float
    compute_s: float
    all_reduce_s: float
    exposed_s: float
    epoch_s: float
    run_s: float
    sent_per_step: float
    sent_per_epoch: float
    images_per_s: float
    efficiency: float
    gpu_hours: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s


def predict(work: Work, cluster: Cluster, gpus: int) -> Row:
    """Raise UserError for a batch that the GPUs cannot share, and nodes that are not full."""
    batch = work.batch * gpus if work.weak else work.batch
    batches = work.batches(batch, gpus)
    share = math.ceil(batch / gpus)  # the largest: everybody waits for it
    compute = work.step.seconds(share)
    reduce = [cluster.all_reduce(size, gpus) for size in work.buckets]
    backward = compute * work.step.backward_share if work.overlap else 0.0
    late = exposed(work.buckets, backward, lambda size: cluster.all_reduce(size, gpus))
    step = compute + late
    steps_an_epoch = batches * work.steps_per_batch
    steps = work.epochs * steps_an_epoch
    if work.max_steps is not None:
        whole = math.ceil(work.max_steps / work.steps_per_batch) * work.steps_per_batch
        steps = min(steps, whole)
    traffic = sent(sum(work.buckets), gpus)
    rate = batch / step
    return Row(
        gpus=gpus,
        global_batch=batch,
        local_batch=share,
        lr=work.lr * gpus if work.weak else work.lr,
        compute_s=compute,
        all_reduce_s=sum(reduce),
        exposed_s=late,
        epoch_s=steps_an_epoch * step,
        run_s=steps * step,
        sent_per_step=traffic,
        sent_per_epoch=steps_an_epoch * traffic,
        images_per_s=rate / work.steps_per_batch,
        efficiency=rate / gpus / (work.batch / work.step.seconds(work.batch)),
        gpu_hours=gpus * steps * step / 3600,
    )


def total(parts: Sequence[Row]) -> Row:
    """Return the last part of a run, with the seconds and GPU hours of all."""
    run, hours = sum(part.run_s for part in parts), sum(part.gpu_hours for part in parts)
    return replace(parts[-1], run_s=run, gpu_hours=hours)
