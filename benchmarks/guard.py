"""How often does the guard call a healthy run collapsed, and does it see every collapse?

Commands: python benchmarks/guard.py --collect RUN_DIR... (metrics.jsonl to CURVES)
          python benchmarks/guard.py [--record FILE.md]

Both rules, by the code that training uses, over curves of PGD-5 and FGSM accuracy on training
images. A simulated run has the trend of a recorded healthy one (moving average of five passes),
pass by pass a recorded departure from such a trend (of both accuracies at once, of any healthy
run with that batch, from a pass at most five away), and what 512 images, or a batch, add to it:
new images in every pass, which is harsher than the same ones. A simulated collapse takes accuracy from PGD-5 and none from FGSM.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from dist_adv.config import load_config
from dist_adv.guard import SAMPLE, Measured

CURVES = Path(__file__).parent / "results" / "2026-11-26-guard" / "curves.csv"
# In which pass of a recorded run PGD-5 accuracy was lost; all others are healthy.
COLLAPSED: dict[str, int] = {"zero-64": 13}
# Elsewhere only robust accuracy is stated: from what it fell and to what, in percent.
STATED = {
    "Free vs Fast, alpha = 10/255, pass 84 to 90": (43.4, 0.3),
    "Fast without crops, alpha = 14/255, batch 128, pass 2": (25.0, 2.4),
    "Fast without crops, alpha = 14/255, batch 64, pass 2": (25.0, 1.8),
    "Fast without crops, half the rate, pass 2": (25.0, 4.2),
    "Fast with Nesterov momentum and label smoothing, pass 3": (25.0, 0.0),
}
FALLS = (0.05, 0.1, 0.15, 0.2, 0.3)
PASSES, CHANCE = 45, 0.12
Curve = np.ndarray  # (passes, 2): accuracy under PGD-5, under FGSM


def collect(run_dirs: list[Path]) -> None:
    """Write the curves of run folders to CURVES."""
    CURVES.parent.mkdir(exist_ok=True)
    with CURVES.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["run", "batch", "pass", "pgd", "fgsm"])
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
    """Average each pass with up to two on either side."""
    return np.array([curve[max(0, i - 2) : i + 3].mean(0) for i in range(len(curve))])


class Healthy:
    """True accuracies of made-up healthy runs with one batch size."""

    def __init__(self, curves: list[Curve]) -> None:
        self.trends = [trend(curve) for curve in curves]
        departures = [curve - smooth for curve, smooth in zip(curves, self.trends, strict=True)]
        # The average of five takes a fifth of a single pass's variance with it.
        self.departures = np.stack(departures) * np.sqrt(5 / 4)

    def run(self, random: np.random.Generator) -> Curve:
        smooth = self.trends[random.integers(len(self.trends))]
        near = (np.arange(PASSES) + random.integers(-5, 6, PASSES)).clip(0, PASSES - 1)
        departures = self.departures[random.integers(len(self.trends), size=PASSES), near]
        return (smooth + departures).clip(0, 1)


def collapsing(curve: Curve, begin: int, fall: float, passes: int) -> Curve:
    """Take `fall` from PGD-5 accuracy in equal parts over so many passes, and none from FGSM."""
    lost = fall * (np.arange(len(curve)) - begin + 1).clip(0, passes) / passes
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


def alarms(rule: str, curve: Curve, batch: int, random: np.random.Generator | None) -> list[int]:
    """Say in which passes (from 1) the rule trips; without `random` the curve is what it sees."""
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
    from scipy.stats import beta

    return float(beta.ppf(0.95, k + 1, n - k)) if k < n else 1.0


def tables(runs: int) -> list[str]:
    random = np.random.default_rng(0)
    curves = recorded()
    lines = [
        "| healthy runs | rule | runs with an alarm | rate at most (95 %) | alarms a run |",
        "|---|---|---|---|---|",
    ]
    healthy = {
        batch: Healthy(
            [curve for run, (of, curve) in curves.items() if of == batch and run not in COLLAPSED]
        )
        for batch in (64, 128)
    }
    for batch, made_up in healthy.items():
        true = [made_up.run(random) for _ in range(runs)]
        for rule in ("gap", "wong"):
            found = [len(alarms(rule, curve, batch, random)) for curve in true]
            k = sum(map(bool, found))
            lines.append(
                f"| {runs} of {PASSES} passes, batch {batch} | {rule} | {k} | "
                f"{upper(k, runs):.1%} | {np.mean(found):.2f} |"
            )
    for rule in ("gap", "wong"):
        sound = [(of, curve) for run, (of, curve) in curves.items() if run not in COLLAPSED]
        found = [
            len(alarms(rule, curve, of, None if rule == "gap" else random)) for of, curve in sound
        ]
        k = sum(map(bool, found))
        lines.append(
            f"| {len(sound)} recorded | {rule} | {k} | {upper(k, len(sound)):.1%} | "
            f"{np.mean(found):.2f} |"
        )
    lines += [
        "",
        "| PGD-5 accuracy falls by | over | gap, 64 | gap, 128 | wong, 64 | wong, 128 |",
        "|---|---|---|---|---|---|",
    ]
    for passes in (1, 5):
        for fall in FALLS:
            cells = []
            for rule in ("gap", "wong"):
                for batch, made_up in healthy.items():
                    hits = 0
                    for _ in range(runs):
                        begin = int(random.integers(15, 36))
                        curve = collapsing(made_up.run(random), begin, fall, passes)
                        found = alarms(rule, curve, batch, random)
                        hits += any(begin < each <= begin + passes + 1 for each in found)
                    cells.append(f"{hits / runs:.1%}")
            lines.append(f"| {100 * fall:g} points | {passes} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| recorded collapse | in pass | gap: alarms | seen within a pass, gap | wong |",
        "|---|---|---|---|---|",
    ]
    for run, number in COLLAPSED.items():
        batch, curve = curves[run]
        shares = []
        for rule in ("gap", "wong"):
            found = [alarms(rule, curve, batch, random) for _ in range(runs)]
            shares.append(np.mean([any(0 <= each - number <= 1 for each in one) for one in found]))
        as_recorded = ", ".join(map(str, alarms("gap", curve, batch, None)))
        lines.append(f"| {run} | {number} | {as_recorded} | {shares[0]:.1%} | {shares[1]:.1%} |")
    lines += [
        "",
        "| stated collapse | PGD | gap, 512 images | wong, 64 | wong, 128 |",
        "|---|---|---|---|---|",
    ]
    for name, (high, low) in STATED.items():
        curve = np.array([[high, high + 2], [low, high + 2]]) / 100
        cells = [
            f"{np.mean([bool(alarms(rule, curve, batch, random)) for _ in range(runs)]):.1%}"
            for rule, batch in (("gap", 64), ("wong", 64), ("wong", 128))
        ]
        lines.append(f"| {name} | {high:g} to {low:g} % | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    if options.collect:
        return collect(options.collect)
    lines = tables(options.runs)
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    about = (
        f"`python benchmarks/guard.py --runs {options.runs}`, {datetime.now(UTC):%Y-%m-%d}, commit "
        f"{commit.strip()}, {os.cpu_count()} CPU cores ({platform.machine()})."
    )
    text = "\n".join([about, "", *lines, ""])
    if options.record:
        options.record.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
