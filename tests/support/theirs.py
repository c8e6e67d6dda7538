"""A stranger's networks and images: red says which of three classes an image is of."""

import time

import torch
from torch import Tensor, nn

import dist_adv

MEAN, STD = 0.5, 0.25


class Reds:
    """Colour images, 8x8, of which only the red channel says something."""

    class Options(dist_adv.DataOptions):
        images: int = 150
        classes: int = 3

    def __init__(self, options: Options) -> None:
        self.options = options

    def load(self, split: str) -> tuple[Tensor, Tensor, list[str]]:
        n = self.options.images
        draw = torch.Generator().manual_seed(int(split == "test"))
        labels = torch.arange(n) % 3
        images = torch.rand(n, 3, 8, 8, generator=draw)
        images[:, 0] = 0.2 + 0.3 * labels.view(-1, 1, 1) + 0.1 * (images[:, 0] - 0.5)
        images[:, 0] += 0.4 * (torch.rand(n, 1, 1, generator=draw) - 0.5)
        return images.clamp(0, 1), labels, ["a", "b", "c", "d", "e"][: self.options.classes]


class Red(nn.Module):
    """The nearer the mean of red is to a class's, the higher its logit: right, and honest."""

    def __init__(self, strength: float = 20.0) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([0.2, 0.5, 0.8]))
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        red = x.view(len(x), -1).view(len(x), 3, -1)[:, 0].mean(1, keepdim=True)
        return -self.strength * (red - self.centres) ** 2


class Around(nn.Module):
    """What is done to images before a network and to its logits behind it."""

    def __init__(self, before=None, after=None, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.before, self.after = net or Red(), before, after

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(self.before(x) if self.before else x)
        return self.after(logits) if self.after else logits


class Darker:
    """An attack that takes from red what the ball allows, where it is told to."""

    class Options(dist_adv.AttackOptions):
        strong: bool = False

    def __init__(self, options: Options, threat: dist_adv.Threat) -> None:
        self.step = threat.eps * options.strong

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        return (x - self.step).clamp(0, 1)


class Stubborn(nn.Module):
    """Trains whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = Red(), nn.BatchNorm1d(3, affine=False)

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.net(x))


def probabilities() -> nn.Module:
    return Around(after=lambda logits: logits.softmax(1))


def normalised_outside() -> nn.Module:
    return Around(before=lambda x: x * STD + MEAN)


def normalises_twice() -> nn.Module:
    return Around(before=lambda x: (x - MEAN) / STD)


def bytes_wanted() -> nn.Module:
    return Around(before=lambda x: x / 255)


def from_minus_one() -> nn.Module:
    return Around(before=lambda x: (x + 1) / 2)


def blue_first() -> nn.Module:
    return Around(before=lambda x: x.flip(1))


def noisy() -> nn.Module:
    return Around(after=lambda logits: logits + 0.1 * torch.randn_like(logits))


def of_the_batch() -> nn.Module:
    return Around(before=lambda x: x - x.mean((0, 2, 3), keepdim=True) + 0.5)


def no_numbers() -> nn.Module:
    return Around(after=lambda logits: logits / 0)


def shared_out() -> nn.Module:
    return nn.DataParallel(Red())


def half() -> nn.Module:
    return Red().to(torch.float16)


def unseeded() -> nn.Module:
    net = Red()
    net.register_buffer("tag", torch.rand(3))
    return net


def five_classes() -> nn.Module:
    return Around(after=lambda logits: nn.functional.pad(logits, (0, 2), value=-100.0))


def a_pair() -> nn.Module:
    return Around(after=lambda logits: (logits, logits))


def fails() -> nn.Module:
    return Around(before=lambda x: x @ torch.ones(3, 3))


def raises() -> nn.Module:
    raise KeyError("no such checkpoint")


def nothing() -> None:
    return None


def slow() -> nn.Module:
    """To attack."""

    def wait(x: Tensor) -> Tensor:
        time.sleep(0.1 if x.requires_grad else 0)
        return x

    return Around(before=wait)


NUMBER = 3
READY = Red()
