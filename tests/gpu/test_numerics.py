"""Numbers of a GPU: random ones, fp32 that is IEEE's, fp16 that overflows."""

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from cases import config
from dist_adv import rng
from dist_adv.attacks.threat import Linf
from dist_adv.config import parse_config
from dist_adv.data import load_dataset
from dist_adv.distributed import start
from dist_adv.distributed.ddp import flag_nonfinite
from dist_adv.training.learner import Learner
from dist_adv.training.meter import Meter
from dist_adv.training.run import train_run


def test_random_numbers_are_those_of_a_cpu_bit_for_bit(gpu):
    keys = rng.sample_keys(rng.stream_key(0, "test", 1), torch.arange(1000))
    there = keys.to(gpu)
    assert torch.equal(rng.sample_keys(7, there).cpu(), rng.sample_keys(7, keys))
    assert torch.equal(rng.substream(there, "restart 1").cpu(), rng.substream(keys, "restart 1"))
    assert torch.equal(rng.bits(there, (3, 32, 32)).cpu(), rng.bits(keys, (3, 32, 32)))
    assert torch.equal(rng.uniform(there, (3, 32, 32)).cpu(), rng.uniform(keys, (3, 32, 32)))
    assert torch.equal(rng.integers(there, 50_000).cpu(), rng.integers(keys, 50_000))


def test_normal_random_numbers_are_those_of_a_cpu_to_an_ulp(gpu):
    """Through erfinv, which CUDA computes otherwise, in double: rounded to single nearly always
    the same, and where the double is close to the middle of two singles the one beside it.
    """
    keys = rng.sample_keys(rng.stream_key(0, "test", 1), torch.arange(1000))
    here, there = (rng.normal(each, (3, 32, 32)).cpu() for each in (keys, keys.to(gpu)))
    ulps = (here.view(torch.int32) - there.view(torch.int32)).abs()  # of one sign, or both 0
    assert ulps.max() <= 1
    assert (ulps > 0).float().mean() < 1e-5


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
    if gpu.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
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
    tree = config("natural", "batch", colour, "fp32")
    tree["train"] |= {"max_steps": 1}
    tree["eval"] |= {"attacks": ["pgd-2"]}
    train_run(parse_config(tree, "test"), tmp_path / "run", "none")
    record = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])
    assert (record["precision"], record["tf32"]) == ("fp32", False)


def test_an_overflow_of_fp16_is_skipped_and_the_scale_halves(gpu, started, colour):
    """From a scale that is far too large; a dry run overflows bf16, with larger weights."""
    accelerator = started("fp16")
    assert accelerator.scaler is not None
    tree = config("pgd-random", "batch", colour, "auto")
    tree["optim"] = {"schedule": "constant", "lr": 0.01}  # every step that is taken moves weights
    settings = parse_config(tree, "test")
    learner = Learner(settings, accelerator, load_dataset(settings.data, "train"))
    large = 2.0**24
    if gpu.type == "cpu":
        large = 2.0**127
        with torch.no_grad():
            list(learner.net.bare.parameters())[-2].mul_(1e3)
    accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | {"scale": large})
    meter, taken = Meter(gpu), []
    scales = [large]
    for epoch in range(2):
        for batch in learner.loader.epoch(epoch):
            before = [each.detach().clone() for each in learner.net.bare.parameters()]
            learner.learn(batch, meter)
            pairs = zip(before, learner.net.bare.parameters(), strict=True)
            taken.append(any(not torch.equal(one, two) for one, two in pairs))
            scales.append(accelerator.scaler.get_scale())
    assert taken[0] is False
    assert taken[-1] is True
    halved = [after == before / 2 for before, after in pairwise(scales)]
    assert halved == [not each for each in taken]
    learner.check_updates()  # an overflow is no trouble
    assert all(each.isfinite().all() for each in learner.net.bare.parameters())
