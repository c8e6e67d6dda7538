"""A stand-in for RobustBench's networks: their names, arguments and keys, and code of our own.

robustbench itself pins versions that the tests do not have. `make()` is its module tree.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class PreActBlock(nn.Module):
    """Its projection is of the block's raw input."""

    activated = False

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu()
        inner = self.conv2(self.bn2(self.conv1(active)).relu())
        if "shortcut" in self._modules:
            return inner + self.shortcut(active if self.activated else x)
        return inner + x


class PreActBlockV2(PreActBlock):
    activated = True


class PreActResNet(nn.Module):
    def __init__(
        self, block: type, num_blocks: list[int], num_classes: int = 10, bn_before_fc: bool = False
    ) -> None:
        super().__init__()
        self.conv1, inputs = conv3(3, 64), 64
        for stage, blocks in enumerate(num_blocks):
            outputs = 64 << stage
            first = block(inputs, outputs, 2 if stage else 1)
            rest = [block(outputs, outputs, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            inputs = outputs
        if bn_before_fc:
            self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        if "bn" in self._modules:
            x = self.bn(x).relu()
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu()
        inner = self.conv2(self.bn2(self.conv1(active)).relu())
        return inner + (self.convShortcut(active) if "convShortcut" in self._modules else x)


class WideResNet(nn.Module):
    def __init__(self, depth: int = 28, num_classes: int = 10, widen_factor: int = 10) -> None:
        super().__init__()
        self.conv1, inputs = conv3(3, 16), 16
        for stage in range(3):
            outputs = (16 << stage) * widen_factor
            first = WideBlock(inputs, outputs, 2 if stage else 1)
            rest = [WideBlock(outputs, outputs, 1) for _ in range((depth - 4) // 6 - 1)]
            block = nn.Module()
            block.layer = nn.Sequential(first, *rest)
            self.add_module(f"block{stage + 1}", block)
            inputs = outputs
        self.bn1, self.fc = nn.BatchNorm2d(inputs), nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(1, 4):
            x = self.get_submodule(f"block{stage}.layer")(x)
        return self.fc(F.avg_pool2d(torch.relu(self.bn1(x)), 8).flatten(1))


def make() -> dict[str, ModuleType]:
    """What `sys.modules` has where robustbench is imported."""
    names = ("robustbench", "robustbench.model_zoo", "robustbench.model_zoo.architectures")
    modules = {name: ModuleType(name) for name in names}
    here = sys.modules[__name__]
    return {**modules, f"{names[-1]}.resnet": here, f"{names[-1]}.wide_resnet": here}
