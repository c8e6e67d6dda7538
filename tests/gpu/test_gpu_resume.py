"""A run goes on bit for bit on a GPU: atomic sums and cuDNN's choices would show here."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cases import CASES, config
from dist_adv.config import parse_config
from dist_adv.training.run import train_run

# One of each kernel that a CPU has otherwise: scattered sums, sorts, eigenvalues, tables, fused
# optimisers. On CPUs every case goes on, at any step (tests/resume).
FEW = (
    "free",
    "fast-previous",
    "cuap",
    "prior",
    "nuat",
    "gradalign",
    "adr",
    "adamw",
    "awp-trades",
    "augmented",
)
CHOSEN = [("auto", case) for case in FEW] + [("fp32", "free"), ("fp16", "trades")]
if os.environ.get("DIST_ADV_GPU_TESTS") == "all":
    CHOSEN = [(precision, case) for precision in ("auto", "fp32", "fp16") for case in CASES]


def settings(case: str, root: Path, precision: str) -> dict:
    tree = config(case, "batch", root, precision)
    if "model" in CASES[case].sections:
        pytest.importorskip("timm", reason="this case trains a network of timm")
    else:
        tree["model"]["width"] = 32
    tree["train"] |= {"epochs": 1, "save_steps": 1, "keep": 100, "precision": precision}
    if case != "stages":
        tree["train"] |= {"batch_size": 120 if case == "accumulate" else 128}
    return tree


@pytest.mark.parametrize(("precision", "case"), CHOSEN)
def test_a_run_goes_on_bit_for_bit(precision, case, gpu, colour, tmp_path):
    """`auto` is bf16, or fp16 with a scaler on older GPUs; from the first batch of three."""
    if gpu.type == "cpu" and precision == "fp16":
        pytest.skip("a dry run: fp16 needs a GPU")
    run = parse_config(settings(case, colour, precision), case)
    train_run(run, tmp_path / "whole", "none")
    first = min((tmp_path / "whole" / "checkpoints").iterdir())
    train_run(run, tmp_path / "resumed", str(first))
    whole, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed")
    )
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
