"""Run folders as training leaves them, with figures that a test chooses."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file
from torch import nn

from dist_adv.attacks.threat import Linf
from dist_adv.config import parse_config
from dist_adv.methods.description import describe
from dist_adv.models import ModelOptions, build_model, save_model

PLANNED = 4


def evaluation(attack: str, accuracy: float, n: int = 1000, **settings: Any) -> dict[str, Any]:
    """A line of results.jsonl."""
    correct, z = round(accuracy * n), 1.96
    middle = (correct / n + z * z / (2 * n)) / (1 + z * z / n)
    half = (
        z * math.sqrt(correct / n * (1 - correct / n) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    )
    record = {
        "attack": attack,
        "accuracy": correct / n,
        "correct": correct,
        "n": n,
        "ci95": [middle - half, middle + half],
        "loss": 1.25,
        "flags": [],
        "dataset": "digits",
        "split": "test",
    }
    if attack in ("autoattack", "apgd-t"):
        record |= {"norm": "linf", "eps": 8 / 255, "seed": 0, "precision": "fp32"}
    elif attack != "natural":
        _, steps, *restarts = (*attack.split("-"), "1")
        record |= {
            "steps": int(steps),
            "restarts": int(restarts[0]),
            "step_size": 2 / 255,
            "norm": "linf",
            "eps": 8 / 255,
            "init": "random",
            "loss_fn": "ce",
            "seed": 0,
            "iterate": "last",
            "precision": "fp32",
        }
    return record | settings


def epoch(number: int, seconds: float, **more: Any) -> dict[str, Any]:
    """An epoch's line of metrics.jsonl, of 10 steps."""
    done = number / PLANNED
    return {
        "kind": "epoch",
        "epoch": number,
        "step": 10 * number,
        "seconds": seconds,
        "epoch_seconds": seconds / number,
        "train_loss": 2.3 - done,
        "train_accuracy": 0.1 + 0.5 * done,
        "test_loss": 2.2 - done,
        "test_accuracy": 0.2 + 0.6 * done,
        "pgd_loss": 2.4 - done,
        "pgd_accuracy": 0.1 + 0.3 * done,
        "curve_attack": "pgd-10",
        "curve_n": 100,
    } | more


def make_run(
    folder: Path,
    method: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    results: list[dict[str, Any]] | None = None,
    finished: bool = True,
    eps: float = 8 / 255,
    seed: int = 7,
) -> Path:
    """A run folder; without arguments, one that finished four epochs and was never evaluated."""
    folder.mkdir(parents=True)
    config = {
        "method": method or {"name": "natural"},
        "threat": {"norm": "linf", "eps": eps},
        "model": {"name": "preact_resnet18", "width": 16},
        "data": {"name": "digits"},
        "train": {"epochs": PLANNED, "batch_size": 128, "precision": "auto", "seed": seed},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    options = parse_config({"method": config["method"]}, "made up").method
    env = {
        "method": describe(options, Linf(eps), torch.Size((1, 8, 8)), 10),
        "torch": "2.14.1",
        "git_commit": "0123456789ab-dirty",
        "hardware": {"device": "cpu", "name": "Some CPU", "cores": 2, "threads": 2},
        "world_size": 2,
        "precision": "bf16",
        "started": "2026-05-04T10:11:12+00:00",
        "dataset": {"name": "digits", "train": 1437, "test": 360},
    }
    (folder / "env.json").write_text(json.dumps(env))
    if metrics is None:
        metrics = [epoch(number, 30.0 * number) for number in range(1, PLANNED + 1)]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "results.jsonl", results or [])
    if finished:
        (folder / "model.safetensors").touch()
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


CLASSES = ("cat", "dog", "a rather long name")


def add_examples(folder: Path, channels: int, size: int, classes: Sequence[str] = CLASSES) -> None:
    """Three images, of which the attack fools the first."""
    rng = np.random.default_rng(0)
    clean = rng.random((3, channels, size, size), dtype=np.float32)
    change = 8 / 255 * rng.choice(np.array([-1, 1], dtype=np.float32), clean.shape)
    label = np.array([0, 1, 2])
    tensors = {
        "clean": clean,
        "adversarial": np.clip(clean + change, 0, 1).astype(np.float32),
        "label": label,
        "clean_prediction": label,
        "adversarial_prediction": np.array([1, 1, 2]),
    }
    metadata = {"attack": "pgd-20", "classes": json.dumps(classes)}
    save_file(tensors, folder / "examples.safetensors", metadata=metadata)


def scrambled(model: nn.Module) -> nn.Module:
    """With statistics and scales that are not the initial zeros and ones."""
    draw = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1 and tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=draw)
            tensor.copy_(noise * 0.2 if name.endswith(("bias", "mean")) else 0.5 + noise)
    return model


def add_network(
    folder: Path, options: ModelOptions, channels: int = 3, data: str = "cifar10"
) -> None:
    """Final weights of ten classes, trained within the L-inf ball of the run's made-up figures."""
    mean, std = [0.4914, 0.4822, 0.4465][:channels], [0.2471, 0.2435, 0.2616][:channels]
    model = scrambled(build_model(options, mean, std, list("abcdefghij"), 0))
    trained = {"epoch": 4, "step": 40, "method": "natural", "data": data}
    about = {**model.architecture, "trained": trained, "threat": {"norm": "linf", "eps": 8 / 255}}
    save_model(folder / "model.safetensors", about, model.state_dict())
