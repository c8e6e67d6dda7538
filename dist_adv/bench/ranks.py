"""One rank of the `ranks` case: counts what DDP communicates, and times Fast.

Run by `cases.py`, alone or under torchrun, with width, global batch and rounds; rank 0 prints JSON.
"""

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from dist_adv.bench.cases import Bench
from dist_adv.bench.timing import alternate
from dist_adv.distributed.start import start_accelerator
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter

METHODS: dict[str, dict[str, Any]] = {
    "natural": {"name": "natural"},
    "PGD-7": {"name": "pgd"},
    "Free": {"name": "free", "replays": 4},
    "Fast": {"name": "fast"},
}


def communicated(learner: Learner) -> list[int]:
    """Elements of each gradient bucket that DDP reduces while one batch is learnt."""
    sizes: list[int] = []

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)  # type: ignore[arg-type]

    learner.net.prepared.register_comm_hook(None, count)
    learner.settle()
    sizes.clear()
    learner.learn(next(learner.loader.epoch(0)), Meter(learner.accelerator.device))
    return sizes


def main() -> None:
    width, batch_size, rounds = map(int, sys.argv[1:])
    accelerator = start_accelerator("auto")
    bench = Bench(accelerator, width, batch_size)
    found: dict[str, Any] = {"reduced_times": {}, "bytes": {}, "buckets": {}}
    for name, method in METHODS.items() if accelerator.num_processes > 1 else ():
        learner = bench.learner(method)
        sizes, steps = communicated(learner), learner.clock.step
        parameters = sum(parameter.numel() for parameter in learner.net.bare.parameters())
        found["reduced_times"][name] = sum(sizes) / steps / parameters
        found["bytes"][name] = 4 * sum(sizes) / steps
        found["buckets"][name] = len(sizes) / steps
    learner, meter = bench.learner({"name": "fast"}), Meter(bench.device)
    batch = next(learner.loader.epoch(0))
    sides = {"fast": lambda: learner.learn(batch, meter)}
    timings = alternate(sides, bench.device, rounds, warm_up=3)
    if accelerator.is_main_process:
        print(json.dumps(found | {"step_s": timings.median("fast")}), flush=True)
    accelerator.wait_for_everyone()
    os._exit(0)  # see cli.main


if __name__ == "__main__":
    main()
