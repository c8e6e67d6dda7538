"""Runs that read their images off the disk: what befalls processes around them does not stop them.

Threads read ahead. There are no worker processes to be killed or signalled, and nothing goes
through shared memory, sockets or files of their own.
"""

import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import SMALL, Job, checkpoints, family, status, weights_hash, write_config

pytestmark = pytest.mark.slow

EPOCH = 12  # optimiser steps: four batches, three replays each
STREAMED = {"resident_gb": 0, "workers": 2}


@pytest.fixture(scope="module")
def odd_images(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual ones, and one of which Pillow warns although it reads it."""
    root = shutil.copytree(images, tmp_path_factory.mktemp("odd") / "images")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    odd = b"Exif\0\0II*\0\xff\xff\xff\xff"
    Image.fromarray(noise).save(root / "train" / "a" / "odd.jpg", exif=odd)
    (root / "train" / "a" / "0.png").unlink()
    return root


def settings(path: Path, images: Path, **train: object) -> Path:
    return write_config(path / "run.yaml", "free", images, data=STREAMED, train=train, model=SMALL)


@pytest.fixture(scope="module")
def truth(odd_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts; its images are in memory."""
    path = tmp_path_factory.mktemp("truth")
    config = write_config(path / "run.yaml", "free", odd_images, train={"epochs": 12}, model=SMALL)
    Job(config, path / "run").finish()
    return path / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_every_process(number, odd_images, truth, tmp_path):
    """As scancel, timeout, systemd and a terminal send it."""
    config = settings(tmp_path, odd_images, epochs=12)
    job = Job(config, tmp_path / "run")
    assert job.wait_for_checkpoint(EPOCH)
    assert list(family(job.process.pid)) == [job.process.pid]
    os.killpg(job.process.pid, number)
    assert job.wait() == (130 if number == signal.SIGINT else 143)
    assert status(tmp_path / "run")["state"] == "preempted"
    step = int(checkpoints(tmp_path / "run")[-1].removeprefix("step-"))
    assert EPOCH <= status(tmp_path / "run")["step"] == step < 12 * EPOCH
    again = Job(config, tmp_path / "run")
    again.finish()
    assert "Warning" not in job.output() + again.output()
    assert weights_hash(tmp_path / "run") == weights_hash(truth)


def test_few_open_files_and_a_long_temporary_folder(odd_images, truth, tmp_path):
    """A socket's path has 107 characters at most."""
    long = tmp_path / ("l" * 120)
    long.mkdir()
    config = settings(tmp_path, odd_images, epochs=12)
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40))
    job = Job(config, tmp_path / "run", prepare=limit, env={"TMPDIR": str(long)})
    job.finish()
    assert weights_hash(tmp_path / "run") == weights_hash(truth)


def test_an_image_that_breaks_while_the_run_needs_it(odd_images, tmp_path):
    root = shutil.copytree(odd_images, tmp_path / "images")
    job = Job(settings(tmp_path, root, epochs=1000), tmp_path / "run")
    assert job.wait_for_checkpoint(EPOCH)
    (root / "train" / "b" / "7.png").write_bytes(b"no more")
    assert job.wait(60) == 1
    assert "Traceback" not in job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("dist-adv: ")]
    assert line.startswith(f"dist-adv: data.root: {root}/train/b/7.png: not a readable image")
    assert status(tmp_path / "run")["state"] == "failed"
