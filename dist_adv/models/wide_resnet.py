"""Wide residual networks: WRN-28-10 and 34-10 (Zagoruyko and Komodakis 2016), and WRN-32-10.

WRN-32-10 is the network of Madry et al. (2018) and of the Free paper. It has the five blocks a
stage of WRN-34-10; its shortcuts have no parameters (average pool and zero channels, hence 32
and not 34 layers), its activation is a leaky ReLU of slope 0.1, and only the first stage's
shortcut starts after the activation.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dist_adv.models.layers import NormKind, conv, norm_layer


class WideBlock(nn.Module):
    """A pre-activation block; see the module for the two kinds of shortcut."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        norm: NormKind,
        projection: bool,
        activated_skip: bool,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(norm, inputs)
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.norm2 = norm_layer(norm, outputs)
        self.conv2 = conv(outputs, outputs)
        self.stride, self.new_channels = stride, outputs - inputs
        self.slope = 0.0 if projection else 0.1
        self.activated_skip = activated_skip
        self.shortcut = None
        if projection and inputs != outputs:
            self.shortcut = conv(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.norm1(x), self.slope, inplace=True)
        skip = out if self.activated_skip else x
        if self.shortcut is not None:
            skip = self.shortcut(skip)
        elif self.new_channels:
            before = self.new_channels // 2
            skip = F.avg_pool2d(skip, self.stride)
            skip = F.pad(skip, (0, 0, 0, 0, before, self.new_channels - before))
        out = self.conv1(out)
        return self.conv2(F.leaky_relu(self.norm2(out), self.slope, inplace=True)).add_(skip)


class WideResNet(nn.Module):
    """Three stages of `width * widen` times 1, 2 and 4 channels.

    A depth of 6 n + 4 has projection shortcuts, one of 6 n + 2 those of Madry et al.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        depth: int,
        widen: int,
        width: int,
        norm: NormKind,
    ) -> None:
        super().__init__()
        projection = depth % 6 == 4
        blocks = (depth - (4 if projection else 2)) // 6
        self.slope = 0.0 if projection else 0.1
        self.stem = conv(in_channels, width)
        layers, inputs = [], width
        for stage in range(3):
            outputs = width * widen * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                # Zagoruyko's shortcut starts after the activation wherever it is a projection.
                activated = block == 0 and (inputs != outputs if projection else stage == 0)
                layers.append(WideBlock(inputs, outputs, stride, norm, projection, activated))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.norm = norm_layer(norm, inputs)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.leaky_relu(self.norm(self.blocks(self.stem(x))), self.slope, inplace=True)
        return self.linear(features.mean(dim=(2, 3)))
