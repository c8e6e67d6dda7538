"""How far apart are the weights of one experiment at 1, 2, 3 and 4 ranks?

Command: python benchmarks/invariance.py [--seeds 5] [--record FILE.md]

Trains every method for two passes on 120 noise images, in batches of 33 that no number of ranks
divides and a last batch of 21, with group normalisation (BatchNorm's statistics are each rank's
own), and prints the largest absolute difference of any weight from the run on one rank. Single
precision over several seeds, double precision over one.

The control is one rank whose initial weights are off by one unit in the last place. What it shows
is the experiment's own sensitivity: an ulp that carries an activation over ReLU's kink, or turns
the sign of an input gradient, is a different experiment from there on.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import torch
from safetensors.torch import load_file

from cases import CASES, config, make_images
from dist_adv.config import parse_config
from dist_adv.models import build_model
from dist_adv.training import learner
from dist_adv.training.run import train_run

RANKS = (2, 3, 4)


def off_by_an_ulp(*arguments: object, **options: object) -> torch.nn.Module:
    model = build_model(*arguments, **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.nextafter(torch.full_like(weight, torch.inf)))
    return model


def worker(out: Path, images: Path, numbers: str, seeds: int, control: bool) -> None:
    """Train every case with every seed; what `torchrun` starts."""
    if numbers == "fp64":
        torch.set_default_dtype(torch.float64)
    if control:
        learner.build_model = off_by_an_ulp
    for seed in range(seeds):
        for case in CASES:
            tree = config(case, "group", images)
            tree["train"] |= {"seed": seed}
            train_run(parse_config(tree, case), out / f"{case}-{seed}", "none")
    sys.stdout.flush()
    os._exit(0)


def launch(ranks: int, numbers: str, seeds: int, folder: Path, control: bool = False) -> Path:
    out = folder / f"{ranks}-{numbers}-{control}"
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--worker", str(out), str(folder / "images"), numbers, str(seeds)]
    subprocess.run(command + ["control"] * control, check=True, capture_output=True)
    return out


def difference(one: Path, two: Path) -> float:
    # Not load_model, which gives single precision.
    expected, found = (load_file(run_dir / "model.safetensors") for run_dir in (one, two))
    return max((expected[name] - found[name]).abs().max().item() for name in expected)


def table(numbers: str, seeds: int, folder: Path) -> list[str]:
    alone = launch(1, numbers, seeds, folder)
    others = {f"{ranks} ranks": launch(ranks, numbers, seeds, folder) for ranks in RANKS}
    others["control"] = launch(1, numbers, seeds, folder, control=True)
    lines = [
        f"| method, {numbers} | " + " | ".join(others) + " |",
        "|---|" + "---|" * len(others),
    ]
    for case in CASES:
        cells = []
        for other in others.values():
            found = [difference(alone / f"{case}-{s}", other / f"{case}-{s}") for s in range(seeds)]
            middle = f"{statistics.median(found):.0e} (" if seeds > 1 else ""
            above = sum(each > 1e-4 for each in found)
            cells.append(
                f"{middle}{max(found):.0e}{'; ' * bool(middle)}"
                + (f"{above} above 1e-4)" if middle else "")
            )
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        out, images, numbers, seeds, *control = sys.argv[2:]
        return worker(Path(out), Path(images), numbers, int(seeds), bool(control))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "images")
        double = table("fp64", 1, folder)
        single = table("fp32", options.seeds, folder)
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    text = "\n".join(
        [
            "# One experiment at 1, 2, 3 and 4 ranks",
            "",
            f"`python benchmarks/invariance.py --seeds {options.seeds}`, "
            f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.strip()}, torch {torch.__version__}, "
            f"gloo, {os.cpu_count()} CPU cores ({platform.machine()}).",
            "",
            "Largest absolute difference of any weight from the run on one rank, after two epochs "
            "(batches of 33 and a last one of 21, `model.norm=group`). The control is one rank "
            "whose initial weights are off by one unit in the last place.",
            "",
            *double,
            "",
            f"In single precision, {options.seeds} seeds: median (largest; how many are above "
            "1e-4).",
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
