"""How far apart are the weights of one experiment under DDP, DeepSpeed's ZeRO and FSDP2?

Command: python benchmarks/engines.py [--seeds 3] [--record FILE.md]

Trains every method for two passes on 120 noise images on two ranks, in batches of 33 that two ranks
do not divide and a last batch of 21, with group normalisation, under each file of
`launch/accelerate/` for an engine, and prints the largest absolute difference of any weight from
the same run under DDP. Double precision over one seed, single precision over several.

The control is DDP on one rank: what another order of summation does by itself. In single precision
an ulp that carries an activation over ReLU's kink, or turns the sign of an input gradient, is a
different experiment from there on.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from safetensors.torch import load_file

from cases import CASES, make_images
from launch import train_under

ENGINES = {
    "ZeRO-1": "deepspeed-zero1.yaml",
    "ZeRO-2": "deepspeed-zero2.yaml",
    "ZeRO-3": "deepspeed-zero3.yaml",
    "FSDP2": "fsdp2.yaml",
}


def runs(seeds: int) -> list[dict[str, Any]]:
    wanted = [("fp64", 0), *(("fp32", seed) for seed in range(seeds))]
    return [
        {
            "name": f"{case}-{numbers}-{seed}",
            "case": case,
            "numbers": numbers,
            "train": {"seed": seed, "save_steps": None},
        }
        for case in CASES
        for numbers, seed in wanted
    ]


def difference(one: Path, two: Path) -> float:
    # Not load_model, which gives single precision.
    expected, found = (load_file(run_dir / "model.safetensors") for run_dir in (one, two))
    return max((expected[name].double() - found[name]).abs().max().item() for name in expected)


def table(numbers: str, seeds: int, ddp: Path, others: dict[str, Path]) -> list[str]:
    lines = [
        f"| method, {numbers} | " + " | ".join(others) + " |",
        "|---|" + "---|" * len(others),
    ]
    for case in CASES:
        cells = []
        for other in others.values():
            names = [f"{case}-{numbers}-{seed}" for seed in range(seeds)]
            found = [difference(ddp / name, other / name) for name in names]
            above = sum(each > 1e-4 for each in found)
            cells.append(f"{max(found):.0e}" + f" ({above} above 1e-4)" * (above > 0))
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    every = runs(options.seeds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        make_images(images)
        ddp = train_under(folder / "DDP", images, every)
        others = {"DDP, one rank": train_under(folder / "alone", images, every, ranks=1)}
        for engine, file in ENGINES.items():
            others[engine] = train_under(folder / engine, images, every, file)
            print(f"{engine} is trained", file=sys.stderr, flush=True)
        double = table("fp64", 1, ddp, others)
        single = table("fp32", options.seeds, ddp, others)
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    libraries = ", ".join(
        f"{each} {version(each)}" for each in ("torch", "accelerate", "deepspeed")
    )
    text = "\n".join(
        [
            "# One experiment under DDP, ZeRO-1, ZeRO-2, ZeRO-3 and FSDP2",
            "",
            f"`python benchmarks/engines.py --seeds {options.seeds}`, "
            f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.strip()}, {libraries}, gloo, two ranks "
            f"on {os.cpu_count()} CPU cores ({platform.machine()}).",
            "",
            "Largest absolute difference of any weight from the same run under DDP on two ranks, "
            "after two epochs (batches of 33 and a last one of 21, `model.norm=group`). Stage 3 "
            "and FSDP2 keep no whole parameter on any rank, which the runs check. Under DDP, too, "
            "no weights have their channels last, which the others cannot have.",
            "",
            "In double precision; DeepSpeed keeps its own copy of weights and momentum in single "
            "precision even then.",
            "",
            *double,
            "",
            f"In single precision, the largest of {options.seeds} seeds.",
            "",
            *single,
            "",
        ]
    )
    if options.record:
        options.record.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
