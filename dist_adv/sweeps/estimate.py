"""How long the runs of a sweep would train on this machine, from steps that take seconds.

Each network takes natural steps on ever larger batches until one takes long. The line through their
times, and the passes that a method makes in a step (`plan.StepTime`), give every other step.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from rich.console import Console

from dist_adv.bench import about
from dist_adv.bench.timing import network
from dist_adv.config import Config
from dist_adv.data import DataOptions
from dist_adv.data.datasets import NAMES, stored
from dist_adv.distributed.start import as_it_was, resolve_precision, start_accelerator
from dist_adv.errors import RunFailure, UserError
from dist_adv.methods.natural import NaturalOptions
from dist_adv.plan.measure import (
    SETS,
    Images,
    cost,
    count_images,
    measure_steps,
    without_validation,
    works_of,
)
from dist_adv.plan.model import Cluster, Link, StepTime, Work, predict, total
from dist_adv.sweeps.sweep import Sweep, listing
from dist_adv.terminal import bar
from dist_adv.text import duration

_LONG = 0.5  # seconds of a step
_FIRST, _GROWTH = 2, 4  # images of a batch
_ROUNDS = 3  # of timed steps


@dataclass(frozen=True)
class Estimate:
    """Seconds of training by the name of a run, or why it has none; machines that were timed."""

    seconds: dict[str, float]
    troubles: dict[str, str]
    machines: set[str]


@dataclass(frozen=True)
class _Job:
    """A run, but for its step time."""

    name: str
    config: Config
    images: Images
    works: Sequence[Work]

    def seconds(self, natural: StepTime) -> float:
        alone = Cluster(Link(math.inf))
        return total([predict(work.timed(natural), alone, 1) for work in self.works]).run_s


def show(sweep: Sweep, only: str | None) -> None:
    """List the runs, with a time for each; one that is chosen is listed at once, without."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    if only is not None:
        console.print(listing(replace(sweep, runs=[sweep.find(only)])))
        return
    found = estimate(sweep)
    console.print(listing(sweep, found.seconds))
    if found.seconds:
        console.print(
            f"~{duration(sum(found.seconds.values()))} of training in all, one run after another, "
            f"going by a few steps on {'; '.join(sorted(found.machines))}; evaluation not counted.",
            highlight=False,
        )
    for trouble in dict.fromkeys(found.troubles.values()):
        names = [name for name, other in found.troubles.items() if other == trouble]
        print(f"{', '.join(names)}: no time ({trouble})")


def estimate(sweep: Sweep) -> Estimate:
    """Estimate each run with this machine to itself, without evaluation and checkpoints."""
    found = Estimate({}, {}, set())
    cases: dict[tuple[str, str, int | None], list[_Job]] = {}
    cpu = not torch.cuda.is_available()
    for run in sweep.runs:
        config, train = run.config, run.config.train
        try:
            images = without_validation(config.data, _images(config.data))
            precision = resolve_precision(train.precision, cpu)
            job = _Job(run.name, config, images, works_of(config, images))
            job.seconds(job.works[-1].step)  # refuses what does not fit before anything is timed
        except UserError as error:
            found.troubles[run.name] = str(error)
            continue
        case = network(config.model, images.size), precision, train.threads
        cases.setdefault(case, []).append(job)
    with bar(True) as progress:
        task = progress.add_task("timing steps", total=len(cases), status="")
        for (net, precision, threads), jobs in cases.items():
            progress.update(task, status=f"{net}, {precision}")
            try:
                with as_it_was():
                    natural, machine = _time(jobs, precision, threads)
            except (UserError, RunFailure) as error:
                found.troubles.update({job.name: str(error) for job in jobs})
            else:
                found.machines.add(machine)
                found.seconds.update({job.name: job.seconds(natural) for job in jobs})
            progress.advance(task)
    return found


@cache
def _images(options: DataOptions) -> Images:
    """Return the training split, whose files are looked at where the name does not say it all."""
    if options.name in SETS:
        return SETS[options.name]
    if options.name not in NAMES:
        return count_images(options)
    found = stored(options, "train")
    n, channels, height, width = found.files.shape
    return Images(n, channels, (height, width), len(found.classes))


def _time(jobs: list[_Job], precision: str, threads: int | None) -> tuple[StepTime, str]:
    """Return a natural step of these runs' network, uncompiled, and the machine that took it."""
    accelerator = start_accelerator(precision, threads)
    *_, config = jobs[0].config.stages.values()  # as its last epochs are
    images = jobs[0].images
    train = config.train.model_copy(update={"compile": "none"})
    natural = config.model_copy(update={"method": NaturalOptions(), "train": train})
    points: dict[int, float] = {}
    for size in _sizes(max(work.batch // work.parts for job in jobs for work in job.works)):
        points |= measure_steps(natural, images, [size], accelerator, _ROUNDS)
        if points[size] > _LONG and len(points) > 1:
            break
    here = about(accelerator.device, precision)
    count = f", {here['threads']} in use" if accelerator.device.type == "cpu" else ""
    return StepTime.fit(points, cost(natural)), f"{here['hardware']}{count}, {precision}"


def _sizes(batch: int) -> Iterator[int]:
    sizes = (_FIRST * _GROWTH**k for k in itertools.count())
    yield from itertools.takewhile(lambda size: size < batch, sizes)
    yield batch
