"""fp32 is IEEE's on a GPU, and a run goes on bit for bit there."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cases import CASES, config, make_images
from dist_adv import rng
from dist_adv.attacks.threat import Linf
from dist_adv.config import parse_config
from dist_adv.distributed import start
from dist_adv.distributed.ddp import flag_nonfinite
from dist_adv.training.run import train_run


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """384 images of CIFAR-10's size: smaller ones leave cuDNN little to choose from."""
    root = tmp_path_factory.mktemp("colour")
    make_images(root, train=128, test=4, size=32)
    return root


def settings(case: str, root: Path, precision: str, **train: object) -> dict:
    tree = config(case, "batch", root, precision)
    tree["model"]["width"] = 64
    tree["train"] |= {"batch_size": 128, "epochs": 1, "save_steps": 1, "keep": 100} | train
    return tree


def errors(device: torch.device) -> list[float]:
    """Relative errors against fp64: a convolution, both its gradients, and a matrix product."""
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 128, 3, padding=1, bias=False, device=device)
    x = torch.randn(64, 128, 16, 16, device=device, requires_grad=True)
    matrix = torch.randn(512, 512, device=device)

    def compute(dtype: torch.dtype) -> list[Tensor]:
        net, images = conv.to(dtype), x.detach().to(dtype).requires_grad_()
        out = net(images)
        gradients = torch.autograd.grad(out.square().sum(), [images, net.weight])
        return [out.detach(), *gradients, matrix.to(dtype) @ matrix.to(dtype)]

    pairs = zip(compute(torch.float32), compute(torch.float64), strict=True)
    return [((one - two).abs().max() / two.abs().max()).item() for one, two in pairs]


def test_fp32_is_ieee(gpu):
    """23 bits of mantissa: 1e-6 after some thousand sums, where TF32's 10 bits leave 1e-4."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    if torch.cuda.get_device_capability() >= (8, 0):
        assert max(errors(gpu)) > 5e-5
    start.start_accelerator("fp32")
    assert max(errors(gpu)) < 1e-5


@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.3])
def test_random_starts_and_steps_are_the_cpu_s_bit_for_bit(gpu, eps):
    """Of unsigned integers that become floats, and gradients that are not numbers."""
    ball, shape = Linf(eps), torch.Size((64, 3, 32, 32))
    keys = rng.sample_keys(rng.stream_key(0, "gpu"), torch.arange(64))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gradient[0], gradient[1], gradient[2] = math.nan, math.inf, 0

    def moved(device: torch.device) -> Tensor:
        images, project = x.to(device), ball.around(x.to(device))
        delta = project(ball.random(keys.to(device), shape))
        return images + project(ball.ascend(delta, gradient.to(device), 1.25 * eps))

    assert moved(gpu).cpu().equal(moved(torch.device("cpu")))


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_flagged(gpu, value):
    """In the slot of one update, and the gradients stay as they are."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(gpu)
    model(torch.rand(4, 3, 8, 8, device=gpu)).sum().backward()
    model[0].weight.grad[1, 2, 0, 1] = value
    before = [parameter.grad.clone() for parameter in model.parameters()]
    flags = torch.zeros(3, device=gpu)
    flag_nonfinite(model, flags[1])
    assert flags.tolist() == [0, 0 if value == 1e30 else 1, 0]
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)


def test_an_evaluation_says_that_it_was_not_tf32(colour, tmp_path):
    tree = settings("natural", colour, "fp32", max_steps=1)
    tree["eval"] |= {"attacks": ["pgd-2"]}
    train_run(parse_config(tree, "test"), tmp_path / "run", "none")
    record = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])
    assert (record["precision"], record["tf32"]) == ("fp32", False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_bit_for_bit(case, precision, colour, tmp_path):
    """`auto` is bf16, or fp16 with a scaler on older GPUs; from the first batch of three."""
    if CASES[case].sections.get("model"):
        pytest.importorskip("timm", reason="this case trains a network of timm")
    run = parse_config(settings(case, colour, precision), case)
    train_run(run, tmp_path / "whole", "none")
    first = min((tmp_path / "whole" / "checkpoints").iterdir())
    train_run(run, tmp_path / "resumed", str(first))
    whole, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed")
    )
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
