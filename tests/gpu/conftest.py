"""What only a GPU can show. Without one these tests are skipped, and say so.

DIST_ADV_GPU_TESTS_ON_CPU=1 runs them on a CPU instead: a dry run, which shows that the code of the
tests runs and nothing else. What a CPU does not have is stood in for, or left out, and says so.
GPUs are lent by the minute: what has not begun after 135 s is skipped, which are those that a CPU
shows nearly as well. DIST_ADV_GPU_TESTS=all has no such limit, and has every method of `cases.py`
go on bit for bit.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from cases import make_images
from dist_adv.distributed import graphs, start

DRY_RUN = os.environ.get("DIST_ADV_GPU_TESTS_ON_CPU") == "1"
HURRIED = not DRY_RUN and os.environ.get("DIST_ADV_GPU_TESTS") != "all"
BEGAN, SECONDS = time.monotonic(), 135
ORDER = ("test_numerics", "test_runs", "test_gpu_attacks", "test_compiled", "test_gpu_resume")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=lambda each: ORDER.index(each.path.stem) if each.path.parent == here else -1)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The GPU, also where tests before these have started this process on the CPU."""
    if not (DRY_RUN or torch.cuda.is_available()):
        pytest.skip("needs a GPU that CUDA sees")
    if HURRIED and time.monotonic() - BEGAN > SECONDS:
        pytest.skip(f"{SECONDS} s are over; DIST_ADV_GPU_TESTS=all takes as long as it takes")
    if DRY_RUN:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(graphs, "check_graphs", lambda *_: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield torch.device("cpu" if DRY_RUN else "cuda")
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()


@pytest.fixture
def started(gpu: torch.device) -> Callable[[str], Accelerator]:
    """Start this process in a precision. In a dry run fp16 is bf16 with a scaler, as a stand-in."""

    def started(precision: str) -> Accelerator:
        stand_in = gpu.type == "cpu" and precision == "fp16"
        accelerator = start.start_accelerator("bf16" if stand_in else precision)
        if stand_in:
            accelerator.scaler = torch.amp.GradScaler("cpu")
        assert accelerator.device.type == gpu.type
        return accelerator

    return started


@pytest.fixture(scope="session")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """384 images of CIFAR-10's size: smaller ones leave cuDNN little to choose from."""
    root = tmp_path_factory.mktemp("colour")
    make_images(root, train=128, test=4, size=32)
    return root
