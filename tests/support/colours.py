"""Colour images made here, of CIFAR-10's size: a blurred pattern for each class, and noise.

Some patterns are faint and some are not, so that images differ in how soon they are mistaken.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_adv.data import Dataset


def colours(n: int, classes: int = 10, seed: int = 0) -> Dataset:
    """Return n images (n, 3, 32, 32) of so many classes in turn; `seed` draws the noise alone."""
    patterns = torch.rand(classes, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = F.interpolate(patterns, size=32, mode="bilinear")
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    contrast = 0.8 * torch.rand(n, 1, 1, 1, generator=draw)
    images = 0.5 + contrast * (patterns[labels] - 0.5)
    images += 0.1 * torch.randn(n, 3, 32, 32, generator=draw)
    pixels = (255 * images.clamp(0, 1)).round().to(torch.uint8)
    return Dataset("colours", pixels, labels, [str(k) for k in range(classes)], 4, True)


def learn(net: torch.nn.Module, data: Dataset, epochs: int = 3) -> None:
    """Train a network on them plainly, until it is right about nearly all."""
    x: Tensor = data.images.float() / 255
    adam = torch.optim.Adam(net.parameters(), 0.01)
    for some in torch.arange(len(x)).split(50) * epochs:
        adam.zero_grad()
        F.cross_entropy(net.train()(x[some]), data.labels[some]).backward()
        adam.step()
