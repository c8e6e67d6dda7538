"""Packs against folders: warm, with the page cache dropped, and an index of ImageNet's size.

    python benchmarks/packed.py --out FILE.md

Both sides decode photographs of 375 to 500 pixels, draw boxes at random (RandomResizedCrop to 224),
mirror and batch them: this project's loader with two threads, torchvision's ImageFolder and torch's
DataLoader with two processes. In turns; medians of the rounds. Cold rounds need root, to drop the
page cache.
"""

import argparse
import collections
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dist_adv.data import DataOptions, Loader, load_dataset
from dist_adv.data.datasets import Dataset
from dist_adv.data.files import Files
from dist_adv.data.image import Framing
from dist_adv.data.records import INDEX, DiskShards, Paths
from dist_adv.packing import How, run_pack
from dist_adv.testing import make_images

IMAGENET = 1_281_167
DROP = Path("/proc/sys/vm/drop_caches")


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def drop_caches() -> None:
    os.sync()
    DROP.write_text("3")


def ours(
    root: Path, name: str, size: int, scale: tuple[float, float] | None
) -> Callable[[], object]:
    options = {"name": name, "root": str(root), "size": size, "resident_gb": 0.0, "workers": 2}
    if scale:
        options["crop_scale"] = scale
    data = load_dataset(DataOptions.model_validate(options), "train")
    loader = Loader(data, 128, 0, torch.device("cpu"))
    return lambda: collections.deque(loader.epoch(0), maxlen=0)


def theirs(root: Path, size: int, scale: tuple[float, float] | None) -> Callable[[], object]:
    cut = [transforms.RandomResizedCrop(size, scale=scale)] if scale else [transforms.Resize(size)]
    usual = transforms.Compose([*cut, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    data = ImageFolder(str(root / "train"), usual)
    batches = DataLoader(data, 128, shuffle=True, num_workers=2)
    return lambda: collections.deque(batches, maxlen=0)


def turns(sides: dict[str, Callable[[], object]], rounds: int, cold: bool) -> dict[str, float]:
    """Median seconds of each side."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            if cold:
                drop_caches()
            taken[name].append(seconds(side))
    return {name: statistics.median(each) for name, each in taken.items()}


def large_index(folder: Path) -> tuple[float, float]:
    """Seconds and megabytes to the first batch of an epoch, on one of eight ranks."""
    rows = np.zeros(IMAGENET, INDEX)
    rows["label"] = np.arange(IMAGENET) % 1000
    picture = next(folder.glob("train/*/*.jpg"))
    rows["length"] = picture.stat().st_size
    np.save(folder / "index.npy", rows)
    mapped = np.load(folder / "index.npy", mmap_mode="r")
    files = Files(DiskShards([picture], mapped), Framing(224, scale=(0.08, 1.0)), 2)
    labels = torch.from_numpy(mapped["label"].astype(np.int64))
    data = Dataset("made up", files, labels, [str(k) for k in range(1000)], 0, flip=True)
    loader = Loader(data, 512, 0, torch.device("cpu"), world_size=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = seconds(lambda: next(iter(loader.epoch(0))))
    return took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", type=Path, help="a folder of many small files")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| what | folder and DataLoader | pack | ratio |", "|---|---|---|---|"]

    def row(what: str, found: dict[str, float], count: int) -> None:
        a, b = found["theirs"], found["ours"]
        lines.append(f"| {what} | {count / a:.0f} images/s | {count / b:.0f} | {a / b:.2f} |")
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name) / "images"
        started = seconds(
            lambda: large_index(make_images(Path(name) / "one", classes=2, train=1, test=1))
        )
        took, more = large_index(Path(name) / "one")
        print(
            f"an index of {IMAGENET:,}: {took:.2f} s, {more:.0f} MB more ({started:.1f} s in all)"
        )
        make_images(folder, classes=4, train=asked.images // 4, test=1, sizes=(375, 500))
        run_pack(folder, Path(name) / "packed", How())
        scale = (0.08, 1.0)
        sides = {
            "theirs": theirs(folder, 224, scale),
            "ours": ours(Path(name) / "packed", "packed", 224, scale),
        }
        row("224 pixels, boxes at random, warm", turns(sides, asked.rounds, False), asked.images)
        records = Paths([str(path) for path in sorted(folder.glob("train/*/*.jpg"))])
        decoding = seconds(lambda: [records.read(k, Framing(), None) for k in range(200)]) / 200
        whole = (
            seconds(
                lambda: [
                    records.read(k, Framing(224, scale=scale), np.full((11, 4), 0.5))
                    for k in range(200)
                ]
            )
            / 200
        )
        print(f"of a picture's {1000 * whole:.1f} ms decoding takes {1000 * decoding:.1f}")
        notes = [
            f"An epoch of {IMAGENET:,} images begins in {took:.2f} s, with {more:.0f} MB more.",
            f"Decoding is {decoding / whole:.0%} of what a picture takes.",
        ]
        if asked.small:
            run_pack(asked.small, Path(name) / "small", How(raw=True))
            count = len(list((asked.small / "train").glob("*/*")))
            sides = {
                "theirs": theirs(asked.small, 32, None),
                "ours": ours(Path(name) / "small", "packed", 32, None),
            }
            row("files of 2 KB, packed as pixels, warm", turns(sides, 1, False), count)
            if os.access(DROP, os.W_OK):
                row("the same, page cache dropped", turns(sides, 1, True), count)
    if asked.out:
        asked.out.write_text("\n".join([*lines, "", *notes]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
