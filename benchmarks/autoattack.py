"""How fast is AutoAttack here, and does it leave what its authors' code leaves?

Command: python benchmarks/autoattack.py RUN_DIR [data.root=...]

The standard ensemble on the first images of `dist-adv eval --limit`: pyautoattack's
`run_standard_evaluation` on all of them as one batch, with the network as `load_model` gives it;
then `dist-adv eval`'s own, as it is and with `eval.compile=default`, of which the time to compile
is a part. Prints a Markdown table; an hour for 200 images and a network of width 16 on two CPU
cores. Needs the test extra.
"""

import argparse
import logging
import time
from pathlib import Path

import pyautoattack
import torch
from rich.logging import RichHandler
from torch import Tensor

from dist_adv import load_model, rng
from dist_adv.attacks.autoattack import AutoAttack
from dist_adv.attacks.threat import build
from dist_adv.config import load_config
from dist_adv.data import load_dataset
from dist_adv.distributed import start
from dist_adv.evaluation.fused import Fused
from dist_adv.evaluation.images import subset
from dist_adv.evaluation.results import wilson

NORMS = {"linf": "Linf", "l2": "L2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    config = load_config(options.run_dir / "config.yaml", options.overrides)
    device = start.start_accelerator("fp32", config.train.threads).device
    data, ball = load_dataset(config.data, "test"), config.threat
    chosen = subset(len(data), options.images)
    x, y = (data.images[chosen].float() / 255).to(device), data.labels[chosen].to(device)
    keys = rng.sample_keys(rng.stream_key(0, "attack"), chosen.to(device))

    def theirs() -> set[int]:
        model = load_model(options.run_dir).to(device)
        known = {"norm": NORMS[ball.norm], "eps": ball.eps, "seed": 0, "device": device}
        attack = pyautoattack.AutoAttack(model, **known)
        images, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
        with torch.no_grad():
            return set((model(images).argmax(1) == y).nonzero().flatten().tolist())

    def ours(fuse: bool) -> set[int]:
        model = load_model(options.run_dir).to(device)
        if fuse:
            model = Fused(model)
        images = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            right = model(images).argmax(1) == y
        attack = AutoAttack(model, build(ball.norm, ball.eps), len(data.classes))
        return places(attack(images[right], y[right], keys[right])[-1].keys)

    def places(left: Tensor) -> set[int]:
        return set(torch.isin(keys, left).nonzero().flatten().tolist())

    sides = {
        "pyautoattack, one batch": theirs,
        "dist_adv": lambda: ours(fuse=False),
        "dist_adv, eval.compile=default": lambda: ours(fuse=True),
    }
    rows: list[tuple[str, float, set[int]]] = []
    for name, side in sides.items():
        began = time.perf_counter()
        left = side()
        rows.append((name, time.perf_counter() - began, left))
        print(f"{name}: {rows[-1][1]:.0f} s, {len(left)} left", flush=True)
    _, baseline, expected = rows[0]
    print("| | seconds | times as fast | left | 95 % interval | other images |")
    print("|---|---|---|---|---|---|")
    for name, seconds, left in rows:
        low, high = wilson(len(left), len(y))
        print(
            f"| {name} | {seconds:.0f} | {baseline / seconds:.2f} | {len(left)} of {len(y)} | "
            f"{low:.1%} to {high:.1%} | {len(left ^ expected)} |"
        )


if __name__ == "__main__":
    main()
