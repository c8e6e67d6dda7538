"""What goes into a plan, measured or counted here: step times, passes, the link."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from dist_adv.attacks.threat import build as build_threat
from dist_adv.bench.timing import alternate, noise
from dist_adv.config import Config
from dist_adv.data import DataOptions, load_dataset
from dist_adv.data.loader import split
from dist_adv.distributed.failures import plain_failures
from dist_adv.errors import UserError
from dist_adv.methods.cost import Cost, cost_of
from dist_adv.models import build_model
from dist_adv.plan.model import Link, StepTime, Work, buckets, sent
from dist_adv.training.checks import check_divides, check_statistics
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter


@dataclass(frozen=True)
class Images:
    """The training split, as far as a plan needs it; size: (H, W)."""

    n: int
    channels: int
    size: tuple[int, int]
    classes: int


SETS = {
    "cifar10": Images(50_000, 3, (32, 32), 10),
    "cifar100": Images(50_000, 3, (32, 32), 100),
    "svhn": Images(73_257, 3, (32, 32), 10),
    "digits": Images(1438, 1, (8, 8), 10),
}


def count_images(data: DataOptions) -> Images:
    """Return the training split of somebody's own data set, which is loaded for it."""
    split = load_dataset(data, "train")
    channels, *size = split.images.shape[1:]
    return Images(len(split), channels, (size[0], size[1]), len(split.classes))


def without_validation(data: DataOptions, images: Images) -> Images:
    """Return the images that are trained on. Raises UserError where there are none."""
    if data.validation >= images.n:
        raise UserError(f"data.validation: {data.validation} images to hold out of {images.n}")
    return replace(images, n=images.n - data.validation)


def parts_of(config: Config) -> list[Config]:
    """Return a configuration for each stage of a run, of as many epochs as it has.

    Raises UserError where a number of steps ends a run whose epochs differ.
    """
    stages, train = config.stages, config.train
    if len(stages) == 1:
        return [config]
    if train.max_steps:
        raise UserError("train.max_steps: values by epoch are planned by epochs; leave one out")
    parts = []
    for (first, stage), end in zip(stages.items(), [*stages, train.epochs][1:], strict=True):
        update = {"epochs": end - first}
        parts.append(stage.model_copy(update={"train": stage.train.model_copy(update=update)}))
    return parts


def works_of(config: Config, images: Images, weak: bool = False) -> list[Work]:
    """Return the work of each stage of a run, but for the step time (`Work.timed`).

    images: as they are at the end. `predict` then raises UserError for a batch size that they do
    not fit.
    """
    works = []
    for part in parts_of(config):
        side = part.data.size
        size = (side, side) if side else images.size
        work = _work_of(part, replace(images, size=size), weak)
        works.append(replace(work, area=math.prod(size) / math.prod(images.size)))
    return works


def _work_of(config: Config, images: Images, weak: bool) -> Work:
    train, network = config.train, blank_network(config, images)

    def batches(batch: int, gpus: int) -> int:
        if weak and batch > images.n:
            raise UserError(
                f"--weak: {gpus} x {train.batch_size} is a batch of {batch} of {images.n} images; "
                f"use fewer GPUs or a smaller train.batch_size"
            )
        mixes = config.data.augmentation().mixes
        check_divides(batch, train.accumulate, gpus)
        number, smallest = split(images.n, batch, config.data.drop_last, gpus, mixes)
        check_statistics(smallest // train.accumulate, network)
        return number

    passes = cost(config)
    return Work(
        StepTime(0.0, 1.0, passes),
        gradient_buckets(network),
        train.batch_size,
        train.epochs,
        passes.steps,
        config.optim.lr,
        batches,
        train.max_steps,
        overlap=train.compile == "none",  # see network.compile_network
        weak=weak,
        parts=train.accumulate,
    )


def blank_network(config: Config, images: Images) -> nn.Module:
    """Return the network without weights, which take no memory."""
    grey, classes = [0.5] * images.channels, ["?"] * images.classes
    with torch.device("meta"):
        return build_model(config.model, grey, grey, classes, 0, images.size, pretrained=False)


def gradient_buckets(network: nn.Module) -> list[int]:
    """Bytes of each of DDP's all-reduces in a step, in fp32; the last layer's come first."""
    return buckets([4 * parameter.numel() for parameter in reversed(list(network.parameters()))])


def cost(config: Config) -> Cost:
    """Return what a batch of this method costs, where AWP is asked for with it from the start."""
    threat = build_threat(config.threat.norm, config.threat.eps)
    return cost_of(config.method, threat, perturbed=config.awp is not None)


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

    As steps are in the last epochs, of batches that are taken at once and were not augmented.
    `tick` is called len(sizes) * (rounds + 1) times.
    """
    sides: dict[str, Callable[[], None]] = {}
    *_, config = config.stages.values()
    data = config.data.model_copy(update={"augment": False})
    with plain_failures(accelerator, "train.batch_size", config.train.batch_size):
        for size in sizes:
            batch_size = size * accelerator.num_processes
            update = {"batch_size": batch_size, "accumulate": 1}
            train = config.train.model_copy(update=update)
            some = noise(batch_size, images.size, images.classes, images.channels)
            update = {"data": data, "train": train}
            learner = Learner(config.model_copy(update=update), accelerator, some)
            learner.settle()
            batch = next(learner.loader.epoch(0))
            learn = partial(learner.learn, batch, Meter(accelerator.device))
            sides[str(size)] = learn if communicate else partial(_alone, learner, learn)
        timings = alternate(sides, accelerator.device, rounds, tick=tick)
    per_batch = cost(config).steps
    return {size: timings.median(str(size)) / per_batch for size in sizes}


def _alone(learner: Learner, learn: Callable[[], None]) -> None:
    with learner.accelerator.no_sync(learner.net.prepared):
        learn()


def time_all_reduce(accelerator: Accelerator, size: int, rounds: int = 15) -> float:
    """Seconds of an all-reduce of `size` bytes over the ranks: the median."""
    numbers = torch.zeros(size // 4, device=accelerator.device)
    sides = {"reduce": lambda: dist.all_reduce(numbers)}
    return alternate(sides, accelerator.device, rounds, warm_up=3).median("reduce")


def measure_link(accelerator: Accelerator) -> Link:
    """Return the link that makes the ring formula true for two sizes, over the ranks at hand."""
    ranks, (small, large) = accelerator.num_processes, (2**16, 2**24)
    latency, long = (time_all_reduce(accelerator, size) for size in (small, large))
    bandwidth = sent(large - small, ranks) / max(long - latency, 1e-9)
    rest = latency - sent(small, ranks) / bandwidth
    return Link(bandwidth, max(0.0, rest / (2 * (ranks - 1))))
