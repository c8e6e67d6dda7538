"""How near are a network's convolutions to this CPU's matrix product, layer by layer?

Command: python benchmarks/cpu_layers.py [--width 64] [--dtype bf16]

For each shape of convolution in PreActResNet18: the forward pass, the gradient of the images and
that of the weights, as oneDNN computes them, and the same by one matrix product of the unfolded
images; then a whole forward and backward pass, with memory as glibc hands it out and as dist_adv
has it. Medians; a Markdown table.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_adv import allocator
from dist_adv.config import parse_config
from dist_adv.models import build_model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
IMAGES = 128
# Of width 1: channels in and out, side of the map, stride; and how many there are.
SHAPES = {
    (1, 1, 32, 1): 4,
    (1, 2, 32, 2): 1,
    (2, 2, 16, 1): 3,
    (2, 4, 16, 2): 1,
    (4, 4, 8, 1): 3,
    (4, 8, 8, 2): 1,
    (8, 8, 4, 1): 3,
}


def milliseconds(work: Callable[[], object], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * sorted(times[2:])[repeats // 2]


def unfolded(x: Tensor, stride: int) -> Tensor:
    """(n, C, H, W) with its channels last to (n x places, 9 C), for kernels of 3x3."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    n, height, width, channels = padded.shape
    rows, columns = ((side - 3) // stride + 1 for side in (height, width))
    image, row, column, _ = padded.stride()
    windows = padded.as_strided(
        (n, rows, columns, 3, 3 * channels), (image, row * stride, column * stride, row, 1)
    )
    return windows.reshape(n * rows * columns, 9 * channels)


def layers(width: int, dtype: torch.dtype) -> None:
    square = torch.randn(4096, 4096).to(dtype)
    peak = 2 * 4096**3 / milliseconds(lambda: square @ square) / 1e9
    print(f"matrix product of 4096: {peak:.2f} Tflop/s\n")
    print("| channels, map | Gflop | at the product's rate | forward | images | weights |", end="")
    print(" unfolding | weights by a product |\n|---|---|---|---|---|---|---|---|")
    total = 0.0
    for (inputs, outputs, side, stride), many in SHAPES.items():
        inputs, outputs = width * inputs, width * outputs
        layout = torch.channels_last
        x = torch.randn(IMAGES, inputs, side, side).to(dtype).contiguous(memory_format=layout)
        weight = torch.randn(outputs, inputs, 3, 3).to(dtype).contiguous(memory_format=layout)
        y = F.conv2d(x, weight, stride=stride, padding=1)
        gradient = torch.randn_like(y)

        def backward(
            images: bool,
            weights: bool,
            given: tuple[Tensor, Tensor, Tensor, int] = (gradient, x, weight, stride),
        ) -> object:
            *tensors, step = given
            return torch.ops.aten.convolution_backward(
                *tensors, None, [step] * 2, [1, 1], [1, 1], False, [0, 0], 1, [images, weights, 0]
            )

        times = (
            milliseconds(lambda x=x, w=weight, s=stride: F.conv2d(x, w, stride=s, padding=1)),
            milliseconds(lambda backward=backward: backward(True, False)),
            milliseconds(lambda backward=backward: backward(False, True)),
        )
        total += many * sum(times)
        flat, rows = unfolded(x, stride), gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
        work = 2 * y.numel() * 9 * inputs / 1e9
        others = (
            milliseconds(lambda x=x, s=stride: unfolded(x, s)),
            milliseconds(lambda flat=flat, rows=rows: flat.T @ rows),
        )
        columns = [f"{each:.1f}" for each in (work, work / peak, *times, *others)]
        name = f"{inputs} to {outputs}, {side}x{side}" + (" halved" if stride == 2 else "")
        print(f"| {name} | {' | '.join(columns)} |", flush=True)
    print(f"\nall convolutions of a pass: {total:.0f} ms")


def a_pass(width: int, dtype: torch.dtype, memory: str) -> None:
    tree = {"method": {"name": "natural"}, "model": {"name": "preact_resnet18", "width": width}}
    model = build_model(
        parse_config(tree, "here").model, [0.5] * 3, [0.25] * 3, [str(k) for k in range(10)], 0
    )
    model.to(memory_format=torch.channels_last).train()
    x = torch.rand(IMAGES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.arange(IMAGES) % 10

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        model.zero_grad()

    print(f"a forward and backward pass, {memory} memory: {milliseconds(step):.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("part", nargs="?", choices=["layers", "usual", "kept"])
    options = parser.parse_args()
    if options.part is None:  # in a process of its own: torch reads its variable once
        for part in ("layers", "usual", "kept"):
            large = {"THP_MEM_ALLOC_ENABLE": str(int(part != "usual"))}
            subprocess.run([sys.executable, *sys.argv, part], check=True, env=os.environ | large)
        return
    torch.set_num_threads(options.threads)
    if options.part != "usual":
        allocator.keep_freed_memory()
    if options.part == "layers":
        layers(options.width, DTYPES[options.dtype])
    else:
        a_pass(options.width, DTYPES[options.dtype], options.part)


if __name__ == "__main__":
    main()
