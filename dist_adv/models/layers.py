"""What all networks share."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["batch", "group"]


class Normalize(nn.Module):
    """(x - mean) / std a channel; the constants are buffers, so they travel with the weights.

    Images of more digits than the weights, such as NumPy's doubles, are rounded to theirs.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.mean.dtype) - self.mean) / self.std


def norm_layer(kind: NormKind, channels: int) -> nn.Module:
    """BatchNorm2d, or GroupNorm with 8 groups (fewer where 8 does not divide the channels).

    GroupNorm mixes no samples, so that a run gives the same weights at any number of ranks.
    """
    if kind == "group":
        return nn.GroupNorm(math.gcd(channels, 8), channels)
    return nn.BatchNorm2d(channels)


class NarrowProjection(nn.Conv2d):
    """Take a 1x1 convolution with a stride of every stride-th pixel, which is the same.

    oneDNN (3.12, of torch 2.14) computes the weight gradient of the former into a workspace for
    fewer numbers than it writes where the input has fewer channels than a vector has lanes (8 with
    AVX2, 16 with AVX-512) and keeps them last: wrong gradients, a corrupt heap, or a hang
    (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def forward(self, x: Tensor) -> Tensor:
        # avg_pool2d of single pixels keeps the layout, there and back; slicing does not.
        return F.conv2d(F.avg_pool2d(x, 1, self.stride), self.weight)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size (divided by the stride)."""
    narrow = kernel == 1 and stride > 1 and inputs < 16
    kind = NarrowProjection if narrow else nn.Conv2d
    return kind(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
