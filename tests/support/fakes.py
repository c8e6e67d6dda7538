"""Networks that seem robust because attacks fail on them, each made of an honest one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dist_adv
from dist_adv import rng
from dist_adv.attacks.threat import Threat


class Fake(nn.Module):
    """kind: a function of (network, images) to logits."""

    def __init__(self, net: nn.Module, kind: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x: Tensor) -> Tensor:
        return self.kind(self.net, x)


def quantised(net: nn.Module, x: Tensor) -> Tensor:
    """32 levels, by rounding, whose derivative is 0."""
    return net((x * 31).round() / 31)


def resized(net: nn.Module, x: Tensor) -> Tensor:
    """To a random size and back, another each time (Xie et al. 2018)."""
    height, width = x.shape[2:]
    size = int(torch.randint(max(3, height - height // 3), height + 1, ()))
    small = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    return net(F.interpolate(small, (height, width), mode="bilinear", align_corners=False))


def saturated(net: nn.Module, x: Tensor) -> Tensor:
    """The softmax rounds to 0 and 1, and so does its derivative to 0."""
    return 1e5 * net(x)


def without_gradient(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).detach() + 0.0 * x.sum()


def misled(net: nn.Module, x: Tensor) -> Tensor:
    """The gradient's sign is turned, and the output is right."""
    turned = net(2 * x.detach() - x)
    return turned + (net(x) - turned).detach()


class Memoriser(nn.Module):
    """Knows the starts of PGD with seed 0: answers there as at the image, and leads on that way.

    images: those that it will be measured on (n, C, H, W); numbers: theirs in the data set.
    """

    def __init__(
        self, net: nn.Module, images: Tensor, numbers: Tensor, threat: Threat, restarts: int = 10
    ) -> None:
        super().__init__()
        self.net, self.images = net, images
        keys = rng.sample_keys(rng.stream_key(0, "attack"), numbers)
        starts = [
            threat.project(threat.random(rng.substream(keys, f"restart {k}"), images.shape), images)
            for k in range(restarts)
        ]
        self.starts, self.eps = torch.stack(starts), threat.eps

    def forward(self, x: Tensor) -> Tensor:
        away = torch.cdist(x.detach().flatten(1), self.images.flatten(1))
        own = away.argmin(1)
        moved = (x.detach() - self.images[own]).flatten(1)
        starts = self.starts[:, own]
        alike, best = F.cosine_similarity(moved[None], starts.flatten(2), dim=2).max(0)
        known = alike > 0.3  # of a random point to another: 0, give or take 0.02
        start = starts[best, torch.arange(len(x))]
        along = (start * x).flatten(1).sum(1, keepdim=True)
        answer = self.net(self.images[own]).detach()
        first = F.one_hot(answer.argmax(1), answer.shape[1])
        answer = answer - 1e-4 * first * (along - along.detach())
        return torch.where(known[:, None], answer, self.net(x))


KINDS = {each.__name__: each for each in (quantised, resized, saturated, without_gradient, misled)}


def fake(kind: str, run: str) -> nn.Module:
    """For `--model fakes:fake`: a fake of this kind of a run's network."""
    return Fake(dist_adv.load_model(run), KINDS[kind])
