"""The main job in minutes: the four methods on data that ships with a dependency."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from dist_adv import packages
from dist_adv.config import load_config
from dist_adv.report import write_report
from dist_adv.runs.run import read_runs
from dist_adv.tracking import wandb_env
from dist_adv.training.run import train_run

METHODS = ("natural", "pgd", "free", "fast")


def run_demo(out: Path) -> None:
    """Train, evaluate and report under `out`; goes on where an earlier demo stopped."""
    packages.need("matplotlib", "demo", "matplotlib")
    wandb_env.refuse_one_id_for_many(len(METHODS))
    runs = []
    for method in METHODS:
        runs.append(out / method)
        train_run(
            load_config(packages.shipped("configs") / "digits" / f"{method}.yaml"), runs[-1], "auto"
        )
    page = write_report(runs, out / "report")
    attacks = ("natural", "fgsm", "pgd-20", "pgd-50")
    table = Table("training", *attacks, title="accuracy on test images, L-inf 0.2")
    for run in read_runs(runs):
        table.add_row(run.label, *(f"{run.evaluations[name].accuracy:.1%}" for name in attacks))
    Console().print(table)
    print(
        f"\nThe report: {page.resolve()}\n"
        "Natural training falls to the attack; PGD, Free and Fast do not. What to try next:\n"
        "  dist-adv train configs/digits/free.yaml method.replays=8 --run-dir runs/free-8\n"
        "  dist-adv train configs/cifar10/fast.yaml      # a GPU and 170 MB of CIFAR-10"
    )
