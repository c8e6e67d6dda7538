"""Which precision a device gets. The GPUs are stand-ins: there is none where the tests run."""

import pytest
import torch

from dist_adv.errors import UserError
from dist_adv.parallel import resolve_precision

TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to be a GPU of a compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in GPU")

    return pretend


@pytest.mark.parametrize(
    ("capability", "wanted", "found"),
    [
        (TURING, "auto", "fp16"),
        (TURING, "fp16", "fp16"),
        (TURING, "fp32", "fp32"),
        (AMPERE, "auto", "bf16"),
        (AMPERE, "bf16", "bf16"),
        (HOPPER, "auto", "bf16"),
        (HOPPER, "fp16", "fp16"),
    ],
)
def test_gpu(gpu, capability, wanted, found):
    gpu(capability)
    assert resolve_precision(wanted, cpu=False) == found


def test_bf16_is_refused_where_it_would_be_emulated(gpu):
    gpu(TURING)
    with pytest.raises(UserError, match=r"train\.precision: a stand-in GPU has no native bf16"):
        resolve_precision("bf16", cpu=False)


@pytest.mark.parametrize(
    ("features", "found"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_cpu_takes_bf16_where_it_has_the_instructions(monkeypatch, features, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert resolve_precision("auto", cpu=True) == found


def test_cpu_has_no_fp16():
    with pytest.raises(UserError, match=r"train\.precision: fp16 needs a GPU"):
        resolve_precision("fp16", cpu=True)
