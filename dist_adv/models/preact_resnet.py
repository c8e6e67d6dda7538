"""PreActResNet18 (He et al. 2016, 'Identity mappings'), as trained in the Fast and Free papers.

Three networks go by this name, and the first two have the same parameters. A projection starts
after the block's first activation in pytorch-cifar (kuangliu, models/preact_resnet.py) and
robust_overfitting (Rice et al., preactresnet.py), and from the block's raw input in
fast_adversarial (Wong et al., CIFAR10/preact_resnet.py). pytorch-cifar has no final norm, nor has
the network of Wong et al. in their first commit and in RobustBench (Wong2020Fast).
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dist_adv.models.layers import NormKind, conv, norm_layer

Shortcut = Literal["activated", "raw"]


class PreActBlock(nn.Module):
    """norm, relu, conv, norm, relu, conv; a 1x1 convolution where the shape changes."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: NormKind, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(norm, inputs)
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.norm2 = norm_layer(norm, outputs)
        self.conv2 = conv(outputs, outputs)
        self.raw_shortcut = shortcut == "raw"
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = conv(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x), inplace=True)
        skip = x
        if self.shortcut is not None:
            skip = self.shortcut(x if self.raw_shortcut else out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.norm2(out), inplace=True)).add_(skip)


class PreActResNet18(nn.Module):
    """Four stages of two blocks, and a final norm and activation unless told otherwise.

    11,172,170 parameters at width 64, three channels and ten classes. The mean over all
    positions replaces the papers' 4x4 average pool, so any image size will do.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int,
        norm: NormKind,
        shortcut: Shortcut,
        final_norm: bool,
    ) -> None:
        super().__init__()
        self.stem = conv(in_channels, width)
        stages, inputs = [], width
        for stage in range(4):
            outputs = width * 2**stage
            stages += [
                PreActBlock(inputs, outputs, 1 if stage == 0 else 2, norm, shortcut),
                PreActBlock(outputs, outputs, 1, norm, shortcut),
            ]
            inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.norm = norm_layer(norm, inputs) if final_norm else None
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(self.stem(x))
        if self.norm is not None:
            features = F.relu(self.norm(features), inplace=True)
        return self.linear(features.mean(dim=(2, 3)))
