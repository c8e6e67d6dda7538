"""How often does the guard call a healthy run collapsed, and does it see every collapse?

Commands: python benchmarks/guard.py --collect RUN_DIR... (metrics.jsonl to CURVES)
          python benchmarks/guard.py [--record FILE.md]

Both rules, by the code that training uses, over curves of PGD-5 and FGSM accuracy on training
images. A simulated run has the trend of a recorded healthy one (moving average of five epochs),
epoch by epoch a recorded departure from such a trend (of both accuracies at once, of any healthy
run with that batch, from an epoch at most five away), and what 512 images, or a batch, add to it:
new images in every epoch, which is harsher than the same ones. A simulated collapse takes accuracy
from PGD-5 and none from FGSM, from some epoch between 16 and 36 on; it is seen where the alarm
comes after its first epoch, and not later than an epoch after its last.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.stats import beta

from dist_adv.config import load_config
from dist_adv.training.collapse import SAMPLE, Measured

CURVES = Path(__file__).parent / "results" / "2026-11-26-guard" / "curves.csv"
# In which epoch of a recorded run PGD-5 accuracy was lost; all others are healthy.
COLLAPSED = {"zero-64": 13, "zero-64-s1": 11}
# Of these no curve is at hand (docs/experiments.md, results/2026-11-25-small-fast.md). In percent:
# from what robust accuracy fell (25 where it is not stated), and to what.
STATED = {
    "the paper's log, alpha = 10/255, batch 128, epoch 84 to 90": (128, 43.4, 0.3),
    "the paper's log, alpha = 16/255, batch 128, epoch 18": (128, 25.0, 0.0),
    "no crops, alpha = 14/255, batch 128": (128, 25.0, 2.4),
    "no crops, alpha = 14/255, batch 64": (64, 25.0, 1.8),
    "no crops, half the rate, batch 64": (64, 25.0, 4.2),
    "no crops, Nesterov momentum, label smoothing, batch 64": (64, 25.0, 0.0),
}
RULES = ("gap", "wong")
FALLS = (0.05, 0.1, 0.15, 0.2, 0.3)
EPOCHS, CHANCE = 45, 0.12
Curve = np.ndarray  # (epochs, 2): accuracy under PGD-5, under FGSM


def collect(run_dirs: list[Path]) -> None:
    """Write the curves of run folders to CURVES."""
    CURVES.parent.mkdir(exist_ok=True)
    with CURVES.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["run", "batch", "epoch", "pgd", "fgsm"])
        for run_dir in run_dirs:
            batch = load_config(run_dir / "config.yaml").train.batch_size
            for line in (run_dir / "metrics.jsonl").read_text().splitlines():
                record = json.loads(line)
                if record["kind"] == "epoch":
                    accuracies = record["guard_accuracy"], record["guard_fgsm_accuracy"]
                    table.writerow([run_dir.name, batch, record["epoch"], *accuracies])


def recorded() -> dict[str, tuple[int, Curve]]:
    """Read CURVES: of each run its batch and its curve."""
    rows: dict[str, list[dict[str, str]]] = {}
    with CURVES.open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["run"], []).append(row)
    return {
        run: (int(of[0]["batch"]), np.array([[float(r["pgd"]), float(r["fgsm"])] for r in of]))
        for run, of in rows.items()
    }


def trend(curve: Curve) -> Curve:
    """Average each epoch with up to two on either side."""
    return np.array([curve[max(0, i - 2) : i + 3].mean(0) for i in range(len(curve))])


class Healthy:
    """True accuracies of made-up healthy runs, from recorded ones with the same batch."""

    def __init__(self, curves: list[Curve]) -> None:
        self.trends = [trend(curve) for curve in curves]
        departures = [curve - smooth for curve, smooth in zip(curves, self.trends, strict=True)]
        # The average of five takes a fifth of a single epoch's variance with it.
        self.departures = np.stack(departures) * np.sqrt(5 / 4)

    def run(self, random: np.random.Generator) -> Curve:
        smooth = self.trends[random.integers(len(self.trends))]
        near = (np.arange(EPOCHS) + random.integers(-5, 6, EPOCHS)).clip(0, EPOCHS - 1)
        departures = self.departures[random.integers(len(self.trends), size=EPOCHS), near]
        return (smooth + departures).clip(0, 1)


def healthy() -> dict[int, Healthy]:
    """Make up runs of each batch."""
    return {
        batch: Healthy(
            [
                curve
                for run, (of, curve) in recorded().items()
                if of == batch and len(curve) == EPOCHS and run not in COLLAPSED
            ]
        )
        for batch in (64, 128)
    }


def collapsing(curve: Curve, begin: int, fall: float, epochs: int) -> Curve:
    """Take `fall` from PGD-5 accuracy, in equal parts from epoch `begin` on, and none from FGSM."""
    lost = fall * (np.arange(len(curve)) - begin + 2).clip(0, epochs) / epochs
    pgd = (curve[:, 0] - lost).clip(0)
    return np.stack([pgd, np.where(lost > 0, curve.max(1), curve[:, 1])], 1)


def sampled(curve: Curve, n: int, random: np.random.Generator) -> Iterator[tuple[float, float]]:
    """Measure each pass on n images of its own: whoever withstands the stronger attack, withstands
    the weaker one."""
    for pgd, fgsm in curve:
        least, most = min(pgd, fgsm), max(pgd, fgsm)
        strong = random.binomial(n, least)
        weak = strong + (
            random.binomial(n - strong, (most - least) / (1 - least)) if least < 1 else 0
        )
        yield (strong / n, weak / n) if pgd <= fgsm else (weak / n, strong / n)


def alarms(
    rule: str, curve: Curve, batch: int, random: np.random.Generator | None = None
) -> list[int]:
    """Say in which epochs (from 1) the rule trips; without `random` the curve is what it sees."""
    n = SAMPLE if rule == "gap" else batch
    seen = sampled(curve, n, random) if random else iter(curve)
    before, found = None, []
    for number, (pgd, fgsm) in enumerate(seen, 1):
        now = Measured(n, pgd, fgsm, CHANCE) if rule == "gap" else Measured(n, pgd)
        if before and now.collapsed(before):
            found.append(number)
        before = now.reference(before)
    return found


def upper(k: int, n: int) -> float:
    """Bound a rate from above, of which k of n were seen (95 %, Clopper and Pearson)."""
    return float(beta.ppf(0.95, k + 1, n - k)) if k < n else 1.0


def of_healthy_runs(runs: int, random: np.random.Generator) -> list[str]:
    lines = [
        "| healthy runs | rule | runs with an alarm | rate at most (95 %) | alarms a run |",
        "|---|---|---|---|---|",
    ]

    def add(name: str, rule: str, found: list[list[int]]) -> None:
        k, mean = sum(map(bool, found)), np.mean([len(each) for each in found])
        lines.append(f"| {name} | {rule} | {k} | {upper(k, len(found)):.1%} | {mean:.2f} |")

    for batch, made_up in healthy().items():
        true = [made_up.run(random) for _ in range(runs)]
        for rule in RULES:
            found = [alarms(rule, curve, batch, random) for curve in true]
            add(f"{runs} made up, batch {batch}", rule, found)
    sound = [of for run, of in recorded().items() if run not in COLLAPSED]
    found = [alarms("gap", curve, batch) for batch, curve in sound]
    add(f"the {len(sound)} recorded", "gap", found)
    return lines


def of_falls(runs: int, random: np.random.Generator) -> list[str]:
    columns = [(rule, batch, made_up) for rule in RULES for batch, made_up in healthy().items()]
    names = [f"{rule}, {batch}" for rule, batch, _ in columns]
    lines = [
        f"| PGD-5 accuracy falls by | over | {' | '.join(names)} |",
        "|---|---" + "|---" * len(columns) + "|",
    ]
    for epochs, fall in itertools.product((1, 5), FALLS):
        shares = []
        for rule, batch, made_up in columns:
            hits = 0
            for _ in range(runs):
                begin = int(random.integers(16, 37))
                curve = collapsing(made_up.run(random), begin, fall, epochs)
                found = alarms(rule, curve, batch, random)
                hits += any(begin <= each <= begin + epochs for each in found)
            shares.append(f"{hits / runs:.1%}")
        over = "an epoch" if epochs == 1 else f"{epochs} epochs"
        lines.append(f"| {100 * fall:g} points | {over} | {' | '.join(shares)} |")
    return lines


def of_collapses(runs: int, random: np.random.Generator) -> list[str]:
    curves = recorded()
    lines = [
        "| collapse | PGD, % | gap | wong |",
        "|---|---|---|---|",
    ]
    seen = [(f"{run}, epoch {number}", number, *curves[run]) for run, number in COLLAPSED.items()]
    for name, (batch, high, low) in STATED.items():
        seen.append((name, 2, batch, np.array([[high, high + 2], [low, high + 2]]) / 100))
    for name, number, batch, curve in seen:
        shares = []
        for rule in RULES:
            found = [alarms(rule, curve, batch, random) for _ in range(runs)]
            hits = [any(0 <= each - number <= 1 for each in one) for one in found]
            shares.append(f"{np.mean(hits):.1%}")
        high, low = 100 * curve[number - 2, 0], 100 * curve[number - 1, 0]
        lines.append(f"| {name} | {high:.1f} to {low:.1f} | {' | '.join(shares)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    if options.collect:
        return collect(options.collect)
    random = np.random.default_rng(0)
    lines: list[str] = []
    for table in (of_healthy_runs, of_falls, of_collapses):
        lines += [*table(options.runs, random), ""]
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    about = (
        f"`python benchmarks/guard.py --runs {options.runs}`, {datetime.now(UTC):%Y-%m-%d}, commit "
        f"{commit.strip()}, {os.cpu_count()} CPU cores ({platform.machine()})."
    )
    text = "\n".join([about, "", *lines])
    if options.record:
        options.record.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
