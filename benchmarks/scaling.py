"""Does `dist-adv plan` foretell what 1, 2 and 4 processes do here?

Command:
  OMP_NUM_THREADS=1 python benchmarks/scaling.py [--width 16] [--batch-size 128] [--record FILE.md]

Each process has one thread. One process alone is timed at a whole, half and quarter of the batch;
N processes are timed with their gradients sent and kept, and so is their all-reduce. The plan gets
the times of the one process and the link of N processes, and knows nothing else, but that
processes which are more than the cores share them. --toy: sizes, and two processes at most, that
only show that it runs.
"""

import argparse
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import track

from dist_adv.bench import about
from dist_adv.bench.ranks import METHODS
from dist_adv.bench.timing import launched
from dist_adv.config import Config, parse_config
from dist_adv.data.loader import split
from dist_adv.distributed import start
from dist_adv.plan.measure import (
    Images,
    blank_network,
    cost,
    gradient_buckets,
    measure_link,
    measure_steps,
    time_all_reduce,
)
from dist_adv.plan.model import Cluster, Link, StepTime, Work, predict
from dist_adv.terminal import console

RANKS = (1, 2, 4)
IMAGES = Images(50_000, 3, (32, 32), 10)


def configuration(method: dict[str, Any], options: argparse.Namespace) -> Config:
    tree = {
        "method": method,
        "model": {"name": "preact_resnet18", "width": options.width},
        "train": {"batch_size": options.batch_size, "threads": 1},
        "track": {"wandb": {"mode": "disabled"}},
    }
    return parse_config(tree, "scaling")


def rank(options: argparse.Namespace) -> None:
    """One of N processes; the first prints what they found."""
    accelerator = start.start_accelerator("auto", threads=1)
    ranks = accelerator.num_processes
    share = options.batch_size // ranks
    sizes = [share] if ranks > 1 else [options.batch_size // part for part in RANKS]
    found: dict[str, Any] = {"alone": {}, "sent": {}}
    for name in options.methods.split(","):
        config = configuration(METHODS[name], options)
        ask = (config, IMAGES, sizes, accelerator, options.rounds)
        found["alone"][name] = measure_steps(*ask)
        if ranks > 1:
            found["sent"][name] = measure_steps(*ask, communicate=True)[share]
    if ranks > 1:
        link = measure_link(accelerator)
        size = sum(gradient_buckets(blank_network(config, IMAGES)))
        found |= {"link": [link.bandwidth, link.latency]}
        found["all_reduce_s"] = time_all_reduce(accelerator, size)
    if accelerator.is_main_process:
        precision = start.precision_of(accelerator)
        print(json.dumps(found | {"about": about(accelerator.device, precision)}), flush=True)
    accelerator.wait_for_everyone()
    os._exit(0)  # see cli.main


def launch(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    chosen = {"--width": options.width, "--batch-size": options.batch_size}
    chosen |= {"--methods": options.methods}
    sizes = [str(word) for pair in (chosen | {"--rounds": options.rounds}).items() for word in pair]
    return launched(ranks, [__file__, "--rank", *sizes])


def compare(name: str, ranks: int, found: dict[int, Any], options: argparse.Namespace) -> str:
    """A line of the table: what the plan says of N processes, and what they did."""
    config = configuration(METHODS[name], options)
    points = {int(size): seconds for size, seconds in found[1]["alone"][name].items()}
    step = StepTime.fit(points, cost(config))
    sharing = max(1.0, ranks / len(os.sched_getaffinity(0)))
    slowed = replace(step, fixed=sharing * step.fixed, per_image=sharing * step.per_image)
    work = Work(
        slowed,
        gradient_buckets(blank_network(config, IMAGES)),
        options.batch_size,
        config.train.epochs,
        step.cost.steps,
        config.optim.lr,
        lambda batch, n: split(IMAGES.n, batch, False, n)[0],
        overlap=False,  # the same cores compute and send
    )
    row = predict(work, Cluster(Link(*found[ranks]["link"])), ranks)
    share = options.batch_size // ranks
    one = points[options.batch_size]
    alone, sent = found[ranks]["alone"][name][str(share)], found[ranks]["sent"][name]
    predicted, measured = one / ranks / row.step_s, one / ranks / sent
    return (
        f"| {name} | {ranks} | {1e3 * row.compute_s:.1f} | {1e3 * alone:.1f} "
        f"| {1e3 * row.step_s:.1f} | {1e3 * sent:.1f} | {predicted:.0%} | {measured:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--record", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.toy:
        options.width, options.batch_size, options.rounds = 4, 16, 2
        options.methods = "natural,Free"
    if options.rank:
        rank(options)
    ranks, names = RANKS[:2] if options.toy else RANKS, options.methods.split(",")
    found = {n: launch(n, options) for n in track(ranks, "processes", console=console)}
    network = blank_network(configuration(METHODS["natural"], options), IMAGES)
    size = sum(gradient_buckets(network))
    two = Link(*found[2]["link"])
    lines = [
        ", ".join(f"{key} {value}" for key, value in found[1]["about"].items()) + ".",
        "",
        f"PreActResNet18 of width {options.width}, global batch {options.batch_size} of 32x32 "
        f"noise, 1 thread a process, medians of {options.rounds}. Efficiency: one process's "
        "measured step, over processes x step.",
        "",
        "| method | processes | computing, ms: predicted | measured | step, ms: predicted | "
        "measured | efficiency: predicted | measured |",
        "|---|---|---|---|---|---|---|---|",
        *(compare(name, n, found, options) for name in names for n in ranks[1:]),
        "",
        "| one process | " + " | ".join(f"{options.batch_size // n} images, ms" for n in RANKS)
        + " | taken as |",
        "|---|---|---|---|---|",
        *(one_process(name, found[1]["alone"][name]) for name in names),
        "",
        f"| all-reduce of {size / 1e6:.1f} MB | measured, ms | ring formula with the link of 2 "
        "processes | with their own |",
        "|---|---|---|---|",
        *(
            f"| {n} processes | {1e3 * found[n]['all_reduce_s']:.2f} "
            f"| {1e3 * two.ring(size, n):.2f} "
            f"| {1e3 * Link(*found[n]['link']).ring(size, n):.2f} "
            f"({found[n]['link'][0] / 1e9:.2f} GB/s, {1e6 * found[n]['link'][1]:.0f} us) |"
            for n in ranks[1:]
        ),
        "",
    ]  # fmt: skip
    text = "\n".join(lines)
    if options.record:
        with options.record.open("a") as file:
            file.write(text + "\n")
    print(text)


def one_process(name: str, points: dict[str, float]) -> str:
    step = StepTime.fit({int(size): seconds for size, seconds in points.items()}, math.nan)
    times = " | ".join(f"{1e3 * points[size]:.1f}" for size in sorted(points, key=int)[::-1])
    return (
        f"| {name} | {times} | {1e3 * step.fixed:.1f} ms + {1e3 * step.per_image:.2f} ms an image |"
    )


if __name__ == "__main__":
    main()
