"""How benchmarks measure: A B A B in one process, after warming up, as medians of paired ratios."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from dist_adv.data import Dataset
from dist_adv.distributed.start import native_bf16
from dist_adv.report.tables import variant


def noise(
    n: int, size: tuple[int, int] = (32, 32), classes: int = 10, channels: int = 3
) -> Dataset:
    """Random images like CIFAR-10's, of size (H, W): what they show costs nothing."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, *size), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, classes, (n,), generator=draw)
    return Dataset("noise", images, labels, [str(k) for k in range(classes)], 4, True)


def network(options: BaseModel, size: tuple[int, int] = (32, 32)) -> str:
    """Return what a step time is of, as records say it: preact_resnet18, 64, batch, 32x32.

    size: (H, W) of the images, which are written as width x height.
    """
    height, width = size
    model = options.model_dump(exclude={"shortcut", "final_norm"})
    return ", ".join(
        [*map(str, model.values()), *variant(options.model_dump()), f"{width}x{height}"]
    )


class Timings:
    """Seconds of the calls of each side; the sides took turns."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = seconds

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """(median, lower quartile, upper quartile) of how many times longer `slow` took.

        Of neighbouring calls, so that a machine which changes its speed meanwhile says little.
        """
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        ratios = [a / b for a, b in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int = 1,
    tick: Callable[[], object] = lambda: None,
) -> Timings:
    """Call the sides in turns, `rounds` times each, after `warm_up` calls of each.

    `tick` is called after every call, outside what is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, call in sides.items():
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - began)
            tick()
    return Timings(seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: what the device can do."""
    # bf16 on a CPU without its instructions: at 2,048 a product may take 17 s.
    on_cpu = 2048 if dtype == torch.float32 or native_bf16() else 512
    n = 8192 if device.type == "cuda" else on_cpu
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=draw).to(device, dtype) for _ in range(2))
    timings = alternate({"product": lambda: a @ b}, device, rounds=10, warm_up=3)
    return 2 * n**3 / min(timings.seconds["product"])


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source: Tensor = torch.rand(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    timings = alternate({"copy": lambda: target.copy_(source)}, device, rounds=10, warm_up=3)
    return 2 * source.numel() * source.element_size() / min(timings.seconds["copy"])


def launched(ranks: int, program: Sequence[str], **variables: str) -> dict[str, Any]:
    """Run a Python program in so many processes on CPUs; return the JSON object it prints last.

    Raises RuntimeError where it fails.
    """
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    done = subprocess.run([*launcher, *program], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(program)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class PeakMemory:
    """The largest memory that was in use since this was made: of the GPU, else of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def megabytes(self) -> float | None:
        """Return the largest memory; None where the system does not tell (no Linux)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(found[0]) * 1024 / 1e6 if found else None
