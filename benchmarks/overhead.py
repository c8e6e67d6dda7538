"""What do checkpoints, the ranks' agreement and the check for NaN cost?

Commands:
  python benchmarks/overhead.py [--width 64] [--pairs 3] [--record FILE.md]
  OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/overhead.py --width 16

Fast training of PreActResNet18 on 32x32 images (noise: what they show costs nothing), batch 128,
in the precision of `auto`. Stretches of 20 batches, which are 5 % of an epoch of CIFAR-10, with a
checkpoint at their start alternate with stretches without: A B A B. The write in the background
falls into the stretch that asked for it. Besides, what every batch spends in agreeing with the
other ranks and in the check for NaN is timed where it happens.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dist_adv.bench.timing import noise
from dist_adv.config import parse_config
from dist_adv.distributed import start
from dist_adv.distributed.session import Session
from dist_adv.runs import checkpoint
from dist_adv.runs.folder import RunFolder
from dist_adv.terminal import bar
from dist_adv.training.display import TrainingDisplay
from dist_adv.training.meter import Meter
from dist_adv.training.nonfinite import NonFinite
from dist_adv.training.trainer import Surroundings, Trainer

STRETCH = 20


class Timed:
    """A function that remembers how long it took each time."""

    def __init__(self, function: Callable) -> None:
        self.function, self.seconds, self.cpu = function, [], []

    def __get__(self, instance: Any, owner: type) -> Callable:
        return lambda *arguments: self(instance, *arguments)

    def __call__(self, *arguments: Any) -> Any:
        began, worked = time.perf_counter(), time.thread_time()
        try:
            return self.function(*arguments)
        finally:
            self.seconds.append(time.perf_counter() - began)
            self.cpu.append(time.thread_time() - worked)

    def share(self, of: float) -> str:
        return f"{1000 * statistics.median(self.seconds):.2f} ms, {sum(self.seconds) / of:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()

    steps = STRETCH * (2 * options.pairs + 1)  # the first stretch warms up
    settings = parse_config(
        {
            "method": {"name": "fast"},
            "model": {"name": "preact_resnet18", "width": options.width},
            "train": {"epochs": 100, "max_steps": steps, "save_minutes": None},
            "eval": {"every": 0},
            "track": {"wandb": {"mode": "disabled"}},
        },
        "overhead",
    )
    Session.boundary = boundary = Timed(Session.boundary)
    NonFinite.before_update = check = Timed(NonFinite.before_update)
    written = Timed(checkpoint.save)
    checkpoint.save = written
    blocked, stretches = Timed(Trainer.save), []
    between = Trainer.between_batches

    def measure(self: Trainer, around: Surroundings, meter: Meter) -> None:
        between(self, around, meter)
        step = self.learner.clock.step
        if step % STRETCH == 0:
            stretches.append(time.perf_counter())
            if step // STRETCH % 2 and step < steps:
                blocked(self, around)

    Trainer.between_batches = measure
    accelerator = start.start_accelerator("auto")
    with tempfile.TemporaryDirectory() as folder, bar(False) as progress:
        session = Session(accelerator, Path(folder), settings.train)
        trainer = Trainer(settings, accelerator, (noise(12800), noise(100)))
        display = TrainingDisplay(progress, trainer.learner.total_steps, 0)
        trainer.fit(Surroundings(RunFolder(Path(folder)), session, None, display))
        session.close()
    if not accelerator.is_main_process:
        os._exit(0)

    seconds = [b - a for a, b in pairwise(stretches)]
    ratios = [a / b for a, b in zip(seconds[::2], seconds[1::2], strict=True)]
    total, plain = sum(seconds), statistics.median(seconds[1::2])
    ratio, low, high = statistics.median(ratios) - 1, min(ratios) - 1, max(ratios) - 1
    stall = statistics.median(blocked.seconds)
    megabytes = 2 * sum(p.numel() for p in trainer.learner.copy.parameters()) * 4 / 1e6
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    text = "\n".join(
        [
            f"`{' '.join(['benchmarks/overhead.py', *sys.argv[1:]])}` on "
            f"{accelerator.num_processes} rank(s) x {torch.get_num_threads()} thread(s), "
            f"{accelerator.mixed_precision}, {datetime.now(UTC):%Y-%m-%d}, commit "
            f"{commit.strip()}, torch {torch.__version__}, {os.cpu_count()} CPU cores "
            f"({platform.machine()})",
            "",
            "| what | figure |",
            "|---|---|",
            f"| {STRETCH} batches without a checkpoint | {plain:.2f} s |",
            f"| with one, against without: median of {len(ratios)} pairs (lowest, highest) | "
            f"{ratio:+.2%} ({low:+.2%}, {high:+.2%}) |",
            f"| weights and momentum in a checkpoint | {megabytes:.0f} MB |",
            f"| training waits for a checkpoint | {1000 * stall:.0f} ms, "
            f"{stall / plain:.2%} of {STRETCH} batches |",
            f"| writing it in the background takes | "
            f"{1000 * statistics.median(written.seconds):.0f} ms, "
            f"{1000 * statistics.median(written.cpu):.0f} ms of a core: "
            f"{statistics.median(written.cpu) / plain / (os.cpu_count() or 1):.2%} of all cores |",
            f"| agreeing with the other ranks, a batch | {boundary.share(total)} |",
            f"| checking for NaN, an update | {check.share(total)} |",
            "",
        ]
    )
    if options.record:
        with options.record.open("a") as file:
            file.write(text + "\n")
    print(text, flush=True)
    if accelerator.num_processes > 1:
        os._exit(0)


if __name__ == "__main__":
    main()
