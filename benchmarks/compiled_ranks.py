"""What does `train.compile` gain on two ranks, as one graph and cut where DDP's buckets end?

Command:
  OMP_NUM_THREADS=1 python benchmarks/compiled_ranks.py [--width 16] [--record FILE.md]

A Fast step of PreActResNet18 on 32x32 images (noise: what they show costs nothing), fp32, one
thread a process, gloo, `train.deterministic` as always. Each line is one start of two processes of
their own, and the order goes there and back: none, cut, whole, whole, cut, none. `whole` is what
`train.compile=default` does; `cut` is what torch would do with its DDPOptimizer, so that the
all-reduce of a bucket overlaps with the backward of the next. --toy: sizes that only show that it
runs.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch._dynamo
from rich.progress import track
from torch import nn

from dist_adv.bench import about
from dist_adv.bench.ranks import METHODS
from dist_adv.bench.timing import launched
from dist_adv.config import parse_config
from dist_adv.distributed import network, start
from dist_adv.plan.measure import Images, measure_steps
from dist_adv.terminal import console

RANKS = 2
ORDER = ("none", "cut", "whole")
IMAGES = Images(50_000, 3, (32, 32), 10)


def rank(options: argparse.Namespace) -> None:
    """One of the processes; the first prints what it found."""
    accelerator = start.start_accelerator("fp32", threads=1)
    config = parse_config(
        {
            "method": METHODS["Fast"],
            "model": {"name": "preact_resnet18", "width": options.width},
            "train": {
                "batch_size": options.batch_size,
                "compile": "none" if options.rank == "none" else "default",
                "precision": "fp32",
                "threads": 1,
            },
            "track": {"wandb": {"mode": "disabled"}},
        },
        "compiled_ranks",
    )
    if options.rank == "cut":
        cut_graphs()
    share = options.batch_size // RANKS
    before = time.perf_counter()
    steps = measure_steps(config, IMAGES, [share], accelerator, options.rounds, communicate=True)
    found = {
        "step_ms": 1e3 * steps[share],
        "start_s": time.perf_counter() - before - options.rounds * steps[share],
        "graphs": torch._dynamo.utils.counters["aot_autograd"]["total"],
        "about": about(accelerator.device, "fp32"),
    }
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    accelerator.wait_for_everyone()
    os._exit(0)  # see cli.main


def cut_graphs() -> None:
    """Leave DDPOptimizer on, as torch has it."""
    compile_whole = network.compile_network

    def compile_network(
        model: nn.Module, choice: Literal["none", "default", "max"], keep_graph: bool
    ) -> None:
        compile_whole(model, choice, keep_graph)
        torch._dynamo.config.optimize_ddp = True

    network.compile_network = compile_network


def launch(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    sizes = ["--width", options.width, "--batch-size", options.batch_size]
    words = ["--rank", kind, *map(str, sizes), "--rounds", str(options.rounds)]
    with tempfile.TemporaryDirectory() as cache:  # or what was compiled once is there already
        return launched(RANKS, [__file__, *words], TORCHINDUCTOR_CACHE_DIR=cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--rank", choices=ORDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.toy:
        options.width, options.batch_size, options.rounds = 4, 8, 2
    if options.rank:
        rank(options)
    kinds = ORDER if options.toy else ORDER + ORDER[::-1]
    found = [(kind, launch(kind, options)) for kind in track(kinds, "starts", console=console)]
    text = "\n".join(
        [
            ", ".join(f"{key} {value}" for key, value in found[0][1]["about"].items()) + ".",
            "",
            f"PreActResNet18 of width {options.width}, global batch {options.batch_size}, {RANKS} "
            f"processes; the median of {options.rounds} Fast steps after the first.",
            "",
            "| train.compile | graphs | step, ms | until the first step was done, s |",
            "|---|---|---|---|",
            *(
                f"| {kind} | {row['graphs']} | {row['step_ms']:.1f} | {row['start_s']:.0f} |"
                for kind, row in found
            ),
            "",
        ]
    )
    if options.record:
        with options.record.open("a") as file:
            file.write(text)
    print(text)


if __name__ == "__main__":
    main()
