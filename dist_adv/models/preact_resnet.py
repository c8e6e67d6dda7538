"""PreActResNet18 (He et al. 2016, 'Identity mappings'), as trained in the Fast and Free papers."""

import torch.nn.functional as F
from torch import Tensor, nn

from dist_adv.models.layers import NormKind, conv, norm_layer


class PreActBlock(nn.Module):
    """norm, relu, conv, norm, relu, conv; a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: NormKind) -> None:
        super().__init__()
        self.norm1 = norm_layer(norm, inputs)
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.norm2 = norm_layer(norm, outputs)
        self.conv2 = conv(outputs, outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = conv(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.norm2(out))) + skip


class PreActResNet18(nn.Module):
    """Four stages of two blocks, and a final norm (which some copies of this network lack).

    11,172,170 parameters at width 64, three channels and ten classes. The mean over all
    positions replaces the papers' 4x4 average pool, so any image size will do.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, norm: NormKind) -> None:
        super().__init__()
        self.stem = conv(in_channels, width)
        stages, inputs = [], width
        for stage in range(4):
            outputs = width * 2**stage
            stages += [
                PreActBlock(inputs, outputs, 1 if stage == 0 else 2, norm),
                PreActBlock(outputs, outputs, 1, norm),
            ]
            inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.norm = norm_layer(norm, inputs)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.linear(features.mean(dim=(2, 3)))
