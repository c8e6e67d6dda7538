"""Which precision a device gets, and what is computed once a network is compiled.

The GPUs are stand-ins: there is none where the tests run.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import PartialState
from accelerate.utils.operations import _gpu_gather
from functorch.compile import make_boxed_func, nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from cases import config
from dist_adv.attacks import ascend, frozen
from dist_adv.attacks.threat import Linf
from dist_adv.config import OptimOptions, parse_config
from dist_adv.data import load_dataset
from dist_adv.distributed import network, start
from dist_adv.distributed.collectives import share_evenly
from dist_adv.distributed.ddp import TrainNet
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.start import resolve_precision
from dist_adv.errors import LostRank, RankFailure, RunFailure, UserError
from dist_adv.models import layers
from dist_adv.training.learner import Learner
from made_up_method import Tiny

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


def test_compiled_attack_computes_no_weight_gradients(monkeypatch):
    """Read off the graphs that torch.compile makes: what each backward convolution is asked for."""
    masks: list[list[bool]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        target = torch.ops.aten.convolution_backward.default
        masks.extend(list(n.args[-1]) for n in graph.graph.nodes if n.target is target)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=nop, bw_compiler=record)
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda model, **kwargs: compile_in_place(model, backend=backend, dynamic=False),
    )
    model = torch.nn.Sequential(layers.conv(3, 4), torch.nn.Flatten(), torch.nn.Linear(256, 2))
    network.compile_network(model, "default", keep_graph=False)
    x, y = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0])
    with frozen(model):
        ascend(model, x, y, torch.zeros_like(x), Linf(0.1), 3, 0.05)
    assert masks == [[True, False, False]]  # compiled once for three steps
    F.cross_entropy(model(x), y).backward()
    assert masks[1:] == [[False, True, False]]


@pytest.mark.parametrize("first", ["attack", "training"])
def test_training_and_attacks_have_code_of_their_own_where_images_want_gradients(
    first, monkeypatch
):
    """As SORA's and Free's do. torch 2.11 took one for the other, and weights got no gradients."""
    counting, compile_in_place = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda model, **kwargs: compile_in_place(model, backend=counting, dynamic=False),
    )
    torch.compiler.reset()
    model = Tiny(Tiny.Options(name="tiny"), channels=3, classes=2)
    network.compile_network(model, "default", keep_graph=False)
    x = torch.rand(5, 3, 8, 8)

    def attack() -> None:
        with frozen(model):
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(model(leaf).sum(), leaf)

    def training() -> None:
        model(x.clone().requires_grad_()).sum().backward()

    order = [attack, training] if first == "attack" else [training, attack]
    for each in (*order, *order):
        each()
    assert all(each.grad is not None and each.grad.any() for each in model.parameters())
    assert counting.frame_count == 2


def test_a_compiled_network_is_one_graph_under_ddp(monkeypatch, tmp_path):
    """dynamo would split it where DDP's buckets end: here after 1 MiB of 2.6 MB."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph

    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda model, **kwargs: compile_in_place(model, backend=record, dynamic=False),
    )
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)  # put back afterwards
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(10)))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        network.compile_network(model, "default", keep_graph=False)
        DistributedDataParallel(model)(torch.rand(2, 256)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 1


def test_weights_without_a_gradient_are_named(tmp_path):
    """DDP would wait for them, and say so in a hundred words at the second batch."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    model.idle = torch.nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    model.forward = lambda x: model[1](model[0](x))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        net = TrainNet(SimpleNamespace(prepare=lambda *both: both), model, OptimOptions())
        net.prepared = DistributedDataParallel(model)
        here = SimpleNamespace(device=torch.device("cpu"))
        data = SimpleNamespace(images=torch.zeros(1, 1, 2, 2))
        with pytest.raises(UserError, match=r"every weight needs .* idle\.1; leave them out"):
            network.settle(here, net, data)
        model.idle.requires_grad_(False)
        net.prepared = DistributedDataParallel(model)
        network.settle(here, net, data)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("deterministic", [True, False])
def test_fp32_is_ieee_and_algorithms_are_chosen(deterministic):
    """Switches that torch leaves otherwise; what they do is shown in tests/gpu."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        with cudnn.flags(benchmark=deterministic, deterministic=not deterministic, allow_tf32=True):
            matmul.allow_tf32 = True
            start.start_accelerator(threads=1, deterministic=deterministic)
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False)
            assert (cudnn.deterministic, cudnn.benchmark) == (deterministic, not deterministic)
    finally:
        matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [
        ("NVIDIA_TF32_OVERRIDE", "1", False),
        ("NVIDIA_TF32_OVERRIDE", "0", True),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", False),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "strict", True),
        ("DNNL_DEFAULT_FPMATH_MODE", "ANY", False),
    ],
)
def test_variables_that_shorten_fp32_are_refused(name, value, fine, monkeypatch):
    monkeypatch.setenv(name, value)
    if fine:
        start.check_fp32_variables()
    else:
        with pytest.raises(UserError, match=f"{name}: '{value}' in the environment .* unset it"):
            start.check_fp32_variables()


def test_ranks_that_have_no_rows_left_share_none(accelerator, monkeypatch):
    """As after an attack that has fooled every image. Accelerate's gather is as it is over NCCL."""
    state = PartialState()
    monkeypatch.setattr(state, "backend", "nccl")
    monkeypatch.setattr(state, "num_processes", 2)

    def gather_alike(out: torch.Tensor, own: torch.Tensor) -> None:
        out.copy_(own.flatten().repeat(2))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather_alike)
    first = SimpleNamespace(
        num_processes=2, process_index=0, device=accelerator.device, gather=_gpu_gather
    )
    for n, mine in ((3, [0, 2, 1]), (0, [])):
        x, y = torch.arange(n)[:, None, None, None].expand(n, 3, 2, 2) / 10, torch.arange(n)
        shared, labels = share_evenly(first, [x, y])
        assert shared.shape == (n, 3, 2, 2)
        assert labels.tolist() == mine


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("ncclInvalidUsage\nDuplicate GPU detected : rank 1 and rank 0", RankFailure, "NPROC"),
        ("NCCL communicator was aborted", LostRank, "lost another rank"),
    ],
)
def test_what_nccl_says(text, kind, says, accelerator):
    with pytest.raises(RunFailure, match=says) as caught, plain_failures(accelerator, "x.y", 8):
        raise torch.distributed.DistBackendError(f"NCCL error in: x.cpp:1, {text}")
    assert type(caught.value) is kind


def test_batchnorm_of_all_ranks_is_not_differentiated_twice(images, accelerator):
    tree = config("gradalign", "batch", images, small=True)
    tree["train"] |= {"sync_batchnorm": True}
    settings = parse_config(tree, "test")
    with pytest.raises(UserError, match="gradalign differentiates a gradient"):
        Learner(settings, accelerator, load_dataset(settings.data, "train"))
