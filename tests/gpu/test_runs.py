"""Whole runs on a GPU: under NCCL, and without memory."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from cases import config
from dist_adv.config import parse_config
from dist_adv.errors import RankFailure
from dist_adv.training.learner import Learner
from dist_adv.training.run import train_run

ROOT = Path(__file__).parents[2]


def test_accelerate_starts_a_rank_under_nccl_that_records_its_passes(gpu, images, tmp_path):
    """DDP of one rank around a network whose passes are CUDA graphs; a dry run has neither."""
    tree = config("free", "batch", images)
    tree["model"] = {"name": "made_up_method:Tiny"}
    tree["train"] |= {"batch_size": 40, "compile": "graphs" if gpu.type == "cuda" else "none"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    file = "multi-gpu.yaml" if gpu.type == "cuda" else "one-gpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "launch/accelerate" / file)]
    program = [str(ROOT / "tests/support/backend.py"), str(tmp_path / "c.yaml")]
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": search}
    done = subprocess.run(
        [*launcher, *program, str(tmp_path / "run")],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    expected = ("nccl", "cuda") if gpu.type == "cuda" else (None, "cpu")
    assert (told["backend"], told["device"], told["n"]) == (*expected, 1)
    assert "not replayed" not in done.stderr + done.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture
def little_memory(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hundredth of the GPU's; a dry run has torch's error raised instead."""
    if gpu.type == "cpu":

        def fails(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        monkeypatch.setattr(Learner, "learn", fails)
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_no_memory_left_is_one_line_with_a_remedy(little_memory, colour, tmp_path):
    """384 images of width 256 in one batch: 3 GB of activations."""
    tree = config("natural", "batch", colour)
    tree["model"]["width"] = 256 if torch.cuda.is_available() else 8
    tree["train"] |= {"batch_size": 384}
    with pytest.raises(RankFailure) as raised:
        train_run(parse_config(tree, "test"), tmp_path / "run", "none")
    said = str(raised.value)
    assert said.startswith("rank 0 of 1 has no memory left (CUDA out of memory")
    assert "try train.batch_size=192 instead of 384" in said
    assert "\n" not in said
