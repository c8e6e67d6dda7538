"""The rows of the papers: complete, and in the settings that are typed here a second time."""

from pathlib import Path
from typing import Any

import pytest

from dist_adv.config import Config
from dist_adv.sweeps.sweep import load_sweep

CONFIGS = Path(__file__).parents[2] / "configs"

PREACT = {
    "name": "preact_resnet18",
    "width": 64,
    "norm": "batch",
    "shortcut": "activated",
    "final_norm": True,
}
RAW = PREACT | {"shortcut": "raw"}
RESNET50 = {"name": "resnet50", "stem": "imagenet", "width": 64, "norm": "batch"}
WRN = {"name": "wide_resnet", "depth": 32, "widen": 10, "width": 16, "norm": "batch"}
NATURAL = {"name": "natural", "guard": "none"}
PGD = {"name": "pgd", "steps": 7, "alpha": 2 / 255, "init": "random", "guard": "none"}


def free(m: int) -> dict[str, Any]:
    return {"name": "free", "replays": m, "guard": "none"}


def fast(alpha: int, init: str = "random", guard: str = "warn") -> dict[str, Any]:
    return {"name": "fast", "alpha": alpha / 255, "init": init, "guard": guard}


# (method, model, peak learning rate, epochs, batch)
PAPER = {
    "free-2": (free(2), PREACT, 0.04, 45, 128),
    "free-4": (free(4), PREACT, 0.04, 45, 128),
    "free-8": (free(8), PREACT, 0.04, 45, 128),
    "free-10": (free(10), PREACT, 0.04, 45, 128),
    "fast-10": (fast(10), PREACT, 0.2, 45, 128),
    "fast-10-256": (fast(10), PREACT, 0.2, 45, 256),
    "fast-16": (fast(16), PREACT, 0.2, 45, 128),
    "fast-16-256": (fast(16), PREACT, 0.2, 45, 256),
    "pgd-7": (PGD, PREACT, 0.2, 45, 128),
    "natural": (NATURAL, PREACT, 0.2, 45, 128),
    "free-8-90": (free(8), PREACT, 0.04, 90, 128),
    "fast-10-90": (fast(10), PREACT, 0.2, 90, 128),
    "resnet50-free-8": (free(8), RESNET50, 0.04, 90, 128),
    "resnet50-fast-10": (fast(10), RESNET50, 0.2, 90, 128),
    "wrn-fast-10": (fast(10), WRN, 0.2, 15, 128),
}
WONG = {
    "wong-zero": (fast(8, "zero"), RAW, 0.2, 30, 128),
    "wong-previous": (fast(8, "previous"), RAW, 0.2, 30, 128),
    "wong-random": (fast(8), RAW, 0.2, 30, 128),
    "wong-fast-10": (fast(10), RAW, 0.2, 30, 128),
    "wong-fast-16": (fast(16), RAW, 0.2, 30, 128),
    "wong-guard": (fast(16, guard="stop") | {"guard_rule": "wong"}, RAW, 0.2, 30, 128),
    "wong-free-8": (free(8), RAW, 0.04, 12, 128),
    "wong-pgd-7": (PGD, RAW, 0.2, 40, 128),
}
SHAFAHI = {
    "shafahi-free-2": (free(2), WRN, 0.1, 103, 128),
    "shafahi-free-4": (free(4), WRN, 0.1, 52, 128),
    "shafahi-free-8": (free(8), WRN, 0.1, 26, 128),
    "shafahi-free-10": (free(10), WRN, 0.1, 21, 128),
    "shafahi-pgd-7": (PGD, WRN, 0.1, 206, 128),
}
SGD = {"momentum": 0.9, "weight_decay": 5e-4, "schedule": "cyclic", "rise": 0.5}
SGD |= {"name": "sgd", "nesterov": False, "decay_norms": True, "clip": None, "warmup": 0.0}
SGD |= {"floor": 0.0, "points": {}, "layer_decay": 1.0}
SGD |= {"beta2": 0.999, "milestones": [0.5, 0.75]}  # AdamW's, and of another schedule
CYCLIC = SGD | {"cycle_momentum": True}
MULTISTEP = SGD | {"cycle_momentum": False, "weight_decay": 2e-4, "schedule": "multistep"}
CIFAR10 = {"name": "cifar10", "augment": True, "validation": 0}
AS_USUAL = CIFAR10 | {"crop_padding": None, "drop_last": False}
AS_MADRY = CIFAR10 | {"crop_padding": 2, "drop_last": True}


def runs(sweep: str) -> dict[str, Config]:
    return {run.name: run.config for run in load_sweep(CONFIGS / f"sweeps/{sweep}.yaml").runs}


@pytest.mark.parametrize(
    ("sweep", "rows", "optim", "data", "precision", "steps", "attacks"),
    [
        ("paper", PAPER, CYCLIC, AS_USUAL, "auto", None, {"pgd-10", "pgd-20", "pgd-50"}),
        ("papers_compared", WONG, CYCLIC, AS_USUAL, "auto", None, {"pgd-50-10"}),
        ("papers_compared", SHAFAHI, MULTISTEP, AS_MADRY, "fp32", 80_000, {"pgd-20", "pgd-100"}),
    ],
    ids=["paper", "wong", "shafahi"],
)
def test_settings(
    sweep: str,
    rows: dict[str, Any],
    optim: dict[str, Any],
    data: dict[str, Any],
    precision: str,
    steps: int | None,
    attacks: set[str],
) -> None:
    found = runs(sweep)
    for name, (method, model, lr, epochs, batch) in rows.items():
        config = found[name].model_dump()
        assert config["method"].pop("attack_mode", "train") == "train", name
        assert config["method"] == {"guard_rule": "gap"} | method, name
        assert config["model"] == model, name
        assert config["threat"] == {"norm": "linf", "eps": 8 / 255, "warmup": 0.0}, name
        assert config["optim"] == optim | {"lr": lr}, name
        assert config["data"].items() >= data.items(), name
        assert set(config["eval"]["attacks"]) >= {"natural"} | attacks, name
        assert config["average"] is config["awp"] is None, name
        train = {
            "epochs": epochs,
            "label_smoothing": 0.0,
            "batch_size": batch,
            "precision": precision,
            "max_steps": steps,
        }
        assert config["train"].items() >= train.items(), name


def test_nothing_is_missing() -> None:
    assert runs("paper").keys() == PAPER.keys()
    assert runs("papers_compared").keys() == WONG.keys() | SHAFAHI.keys()


@pytest.mark.parametrize("name", SHAFAHI)
def test_80000_steps_end_in_the_last_epoch(name: str) -> None:
    config = runs("papers_compared")[name]
    epochs = 80_000 / (50_000 // 128) / getattr(config.method, "replays", 1)
    assert config.train.epochs - 1 < epochs <= config.train.epochs


@pytest.mark.parametrize("part", ["free_m", "fast_alpha_batch"])
def test_the_tables_by_themselves_are_the_same_runs(part: str) -> None:
    rows = list(runs(part).values())
    assert len(rows) == 4
    assert [row for row in rows if row not in runs("paper").values()] == []


@pytest.mark.parametrize(
    ("folder", "sweep"), [("paper", "paper"), ("papers-compared", "papers_compared")]
)
def test_every_row_is_a_file_with_its_name_and_command(folder: str, sweep: str) -> None:
    files = {path.stem: path.read_text() for path in (CONFIGS / folder).glob("*.yaml")}
    assert {stem for stem in files if not stem.endswith("base")} == runs(sweep).keys()
    for name in runs(sweep):
        assert f"# Command: dist-adv train configs/{folder}/{name}.yaml\n" in files[name]
        assert "# Reported: " in files[name]
