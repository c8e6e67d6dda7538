"""How fast is AutoAttack here, and does it leave what its authors' code leaves?

Command: python benchmarks/autoattack.py RUN_DIR [--whole] [data.root=...]

Of the first images of `dist-adv eval --limit`: pyautoattack, with the network as `load_model` gives
it and all images as one batch; `dist-adv eval`'s own attacks; and these with
`eval.compile=default`. In turns (A B C A B C): ten steps towards one class of targeted APGD and of
FAB, sixty queries of Square, on images that survive PGD-20 in a quarter more than the ball; the
whole is their sum, weighted by how often each comes. With --whole the standard ensemble once from
end to end, one side after the other, the time to compile included: half an hour for 200 images and
a network of width 16 on two CPU cores. Needs the test extra.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyautoattack
import torch
from rich.logging import RichHandler
from torch import Tensor, nn

from dist_adv import load_model, rng
from dist_adv.attacks import PGD, frozen
from dist_adv.attacks.apgd import APGD, dlr_targeted
from dist_adv.attacks.autoattack import AutoAttack
from dist_adv.attacks.fab import FAB
from dist_adv.attacks.square import Square
from dist_adv.attacks.threat import Threat, build
from dist_adv.config import load_config
from dist_adv.data import load_dataset
from dist_adv.distributed import start
from dist_adv.evaluation.fused import Fused
from dist_adv.evaluation.images import subset
from dist_adv.evaluation.results import wilson

NORMS = {"linf": "Linf", "l2": "L2"}


def judge(model: nn.Module, ball: Any, device: torch.device) -> pyautoattack.AutoAttack:
    known = {"norm": NORMS[ball.norm], "eps": ball.eps, "seed": 0, "device": device}
    return pyautoattack.AutoAttack(model, **known)


def in_turns(run_dir: Path, x: Tensor, y: Tensor, ball: Threat, keys: Tensor) -> None:
    device = x.device
    theirs, ours = (load_model(run_dir).to(device) for _ in range(2))
    fused = Fused(load_model(run_dir).to(device))
    larger = build(ball.norm, 1.25 * ball.eps)
    survivors = PGD(20, ball.eps / 4, loss="margin")(ours, x, y, larger, keys).survives(20, 1)
    x, y, keys = x[survivors], y[survivors], keys[survivors]
    print(f"{len(x)} images")
    last = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        targets = ours(last).argsort(1, descending=True)[:, 1]
    other = judge(theirs, ball, device)
    for part in (other.apgd_targeted, other.fab):
        part.n_iter, part.n_target_classes = 10, 1
    other.fab.targeted, other.square.n_queries = True, 60
    pieces = {
        "targeted APGD, 10 steps": (APGD(ball, dlr_targeted, 10), other.apgd_targeted, 9 * 10),
        "targeted FAB, 10 steps": (FAB(ball, 10), other.fab, 9 * 10),
        "Square, 60 queries": (Square(ball, 60), other.square, 5000 / 60),
    }
    whole = [0.0, 0.0, 0.0]
    print("| | pyautoattack | dist_adv | eval.compile=default |\n|---|---|---|---|")
    for name, (search, piece, times) in pieces.items():
        sides = (
            lambda piece=piece: piece.perturb(x.clone(), y),
            lambda search=search: search(ours, last, y, targets, keys),
            lambda search=search: search(fused, last, y, targets, keys),
        )
        with frozen(ours), frozen(fused):
            for side in sides:  # compiles, and warms up
                side()
            rounds = [[seconds(side) for side in sides] for _ in range(7)]
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        ratios = [statistics.median(each[0] / each[k] for each in rounds) for k in (1, 2)]
        whole = [sum(pair) for pair in zip(whole, (times * each for each in medians), strict=True)]
        row(name, medians, ratios)
    row("the whole, weighted", whole, [whole[0] / whole[1], whole[0] / whole[2]])


def seconds(side: Callable[[], object]) -> float:
    began = time.perf_counter()
    side()
    return time.perf_counter() - began


def row(name: str, times: Sequence[float], ratios: Sequence[float]) -> None:
    cells = [f"{each:.2f} s ({ratio:.2f}x)" for each, ratio in zip(times[1:], ratios, strict=True)]
    print(f"| {name} | {times[0]:.2f} s | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    config = load_config(options.run_dir / "config.yaml", options.overrides)
    device = start.start_accelerator("fp32", config.train.threads).device
    data, ball = load_dataset(config.data, "test"), config.threat
    chosen = subset(len(data), options.images)
    x, y = (data.images[chosen].float() / 255).to(device), data.labels[chosen].to(device)
    keys = rng.sample_keys(rng.stream_key(0, "attack"), chosen.to(device))

    if not options.whole:
        in_turns(options.run_dir, x, y, build(ball.norm, ball.eps), keys)
        return

    def theirs() -> set[int]:
        model = load_model(options.run_dir).to(device)
        images, _ = judge(model, ball, device).run_standard_evaluation(x, y, batch_size=len(x))
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
