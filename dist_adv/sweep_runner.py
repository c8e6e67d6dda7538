"""The runs of a sweep, each in a folder of its own."""

from pathlib import Path

from dist_adv.runner import train_run
from dist_adv.sweep import Sweep, claim


def run_one(sweep: Sweep, which: str, out: Path) -> None:
    """Train a run of the sweep in this process; every rank of a launcher calls this."""
    run = sweep.find(which)
    claim(sweep, out)
    train_run(run.config, out / run.name, "auto")
