"""What only a GPU can show. Without one these tests are skipped, and say so."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def gpu() -> Iterator[torch.device]:
    """The GPU, also where tests before these have started this process on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that CUDA sees")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield torch.device("cuda")
    AcceleratorState._reset_state(reset_partial_state=True)
