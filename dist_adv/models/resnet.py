"""ResNet50 (He et al. 2016) with a CIFAR or an ImageNet stem.

Parameter names are torchvision's, so its weights load. The Free-against-Fast paper put the
ImageNet stem (7x7 with stride 2, then a max-pool) on 32x32 images: the first stage sees 8x8,
which is why its ResNet50 was both faster and worse than PreActResNet18.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dist_adv.models.layers import NormKind, conv, norm_layer


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels."""

    def __init__(self, inputs: int, channels: int, stride: int, norm: NormKind) -> None:
        super().__init__()
        outputs = 4 * channels
        self.conv1 = conv(inputs, channels, kernel=1)
        self.bn1 = norm_layer(norm, channels)
        self.conv2 = conv(channels, channels, stride=stride)
        self.bn2 = norm_layer(norm, channels)
        self.conv3 = conv(channels, outputs, kernel=1)
        self.bn3 = norm_layer(norm, outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                conv(inputs, outputs, kernel=1, stride=stride), norm_layer(norm, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """23,520,842 parameters (CIFAR stem), 23,528,522 (ImageNet stem) at width 64, ten classes."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stem: Literal["cifar", "imagenet"],
        width: int,
        norm: NormKind,
    ) -> None:
        super().__init__()
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = conv(in_channels, width, kernel, stride)
        self.bn1 = norm_layer(norm, width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        inputs = width
        for stage, blocks in enumerate((3, 4, 6, 3)):
            channels, layers = width * 2**stage, []
            for block in range(blocks):
                stage_stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(inputs, channels, stage_stride, norm))
                inputs = 4 * channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean(dim=(2, 3)))
