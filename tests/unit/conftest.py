"""What several unit tests share: this process's Accelerator, the digits, a small robust network."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from colours import colours
from dist_adv.data import DataOptions, Dataset, load_dataset
from dist_adv.distributed import start
from dist_adv.models.layers import Normalize


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    """One process on the CPU, wherever the tests run, and one thread of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return start.start_accelerator(threads=1)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """The 359 digits for testing."""
    return load_dataset(DataOptions(name="digits"), "test")


@pytest.fixture(scope="session")
def pixels(digits: Dataset) -> tuple[Tensor, Tensor]:
    """The same digits as float images in [0, 1], and their labels."""
    return digits.images.float() / 255, digits.labels


class InDouble(nn.Module):
    """Computes in double, so that no rounding of a sum depends on the size of the batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double()).float()


@pytest.fixture(scope="session")
def digits_net() -> nn.Module:
    """A small network trained here, without dist_adv, on digits with noise and FGSM of 0.2.

    Its accuracy falls by degrees with an attack's strength, so attacks can be compared on it.
    """
    data = load_dataset(DataOptions(name="digits"), "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
        return made_robust(net, data, eps=0.2, updates=250)


def made_robust(net: nn.Module, data: Dataset, eps: float, updates: int) -> nn.Module:
    x, y = data.images.float() / 255, data.labels
    adam = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(updates):
        some = torch.randint(len(x), (128,))
        delta = torch.empty_like(x[some]).uniform_(-eps, eps).requires_grad_()
        loss = F.cross_entropy(net(x[some] + delta), y[some])
        moved = delta + 1.25 * eps * torch.autograd.grad(loss, delta)[0].sign()
        attacked = (x[some] + moved.detach().clamp(-eps, eps)).clamp(0, 1)
        adam.zero_grad()
        F.cross_entropy(net(attacked), y[some]).backward()
        adam.step()
    return InDouble(net).eval()


@dataclass(frozen=True)
class Subject:
    """Images, the same as floats x with labels y, a network, and a radius that fools it at times.

    The digits are 8x8 and grey, the others 32x32 and in colour, with a network of convolutions:
    their batches and gradients may have the channels last.
    """

    data: Dataset
    x: Tensor
    y: Tensor
    net: nn.Module
    eps: float


@pytest.fixture(scope="session", params=["digits", "colours"])
def subject(
    request: pytest.FixtureRequest, digits: Dataset, pixels: tuple[Tensor, Tensor]
) -> Subject:
    if request.param == "digits":
        return Subject(digits, *pixels, request.getfixturevalue("digits_net"), 0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            Normalize([0.5] * 3, [0.25] * 3),
            nn.Conv2d(3, 8, 4, stride=4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        net = made_robust(net, colours(1000), eps=0.1, updates=60)
    data = colours(120, seed=1)
    return Subject(data, data.images.float() / 255, data.labels, net, 0.1)


Watch = Callable[[nn.Module, Callable[[Tensor], object]], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def watching() -> Watch:
    """`with watching(model, see):` calls `see` with everything that the model is given."""

    @contextmanager
    def watch(model: nn.Module, see: Callable[[Tensor], object]) -> Iterator[None]:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            see(inputs[0].detach())

        handle = model.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return watch
