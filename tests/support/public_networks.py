"""Networks with the names that public code gives their layers, written plainly, for checkpoints.

They are no code of those repositories, of which some have no licence: names and arithmetic alone.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Constants(nn.Module):
    """(x - mean) / std with buffers of these names."""

    def __init__(self, mean: list[float], std: list[float], names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        for name, values in zip(names, (mean, std), strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (getattr(self, name) for name in self.names)
        return (x - mean) / std


class PreActBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3, 1)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        side = x
        if hasattr(self, "shortcut"):
            side = self.shortcut(x if self.raw else out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + side


class PreActResNet(nn.Module):
    """raw: fast_adversarial's shortcut; final_norm: whether there is a `bn`, and used: whether it
    does anything."""

    def __init__(
        self,
        raw: bool = False,
        final_norm: bool = True,
        width: int = 4,
        classes: int = 3,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        used: bool = True,
    ) -> None:
        super().__init__()
        self.used = used
        self.conv1, inputs = conv(3, width, 3, 1), width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            layers = [PreActBlock(inputs, outputs, 1 if stage == 0 else 2, raw)]
            layers += [PreActBlock(outputs, outputs, 1, raw) for _ in range(count - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            inputs = outputs
        if final_norm:
            self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if hasattr(self, "bn") and self.used:
            out = F.relu(self.bn(out))
        return self.linear(out.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3, 1)
        self.convShortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        side = x if self.convShortcut is None else self.convShortcut(out)
        return side + self.conv2(F.relu(self.bn2(self.conv1(out))))


class Stage(nn.Module):
    def __init__(self, count: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        blocks = [WideBlock(inputs, outputs, stride)]
        blocks += [WideBlock(outputs, outputs, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """sub_block: TRADES' second copy of the first stage, which is never used."""

    def __init__(
        self,
        depth: int = 10,
        widen: int = 2,
        classes: int = 3,
        sub_block: bool = False,
        width: int = 4,
    ) -> None:
        super().__init__()
        count = (depth - 4) // 6
        widths = [width, *(width * widen * 2**stage for stage in range(3))]
        self.conv1 = conv(3, widths[0], 3, 1)
        self.block1 = Stage(count, widths[0], widths[1], 1)
        if sub_block:
            self.sub_block1 = Stage(count, widths[0], widths[1], 1)
        self.block2 = Stage(count, widths[1], widths[2], 2)
        self.block3 = Stage(count, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(out)).mean((2, 3)))


class Normalising(nn.Module):
    """A network with RobustBench's buffers `mu` and `sigma` beside its own layers."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        for name, child in net.named_children():
            self.add_module(name, child)
        self.register_buffer("mu", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("sigma", torch.tensor(std).view(1, 3, 1, 1))
        self.plain = (net,)  # in a tuple, so that its layers have one name alone

    def forward(self, x: Tensor) -> Tensor:
        return self.plain[0]((x - self.mu) / self.sigma)


def scrambled(net: nn.Module, seed: int = 0) -> nn.Module:
    """With random weights, statistics that are not zeros and ones, in eval mode."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(("mu", "sigma", "mean", "std")):
            noise = torch.randn(tensor.shape, generator=draw)
            spread = 0.1 if tensor.dim() == 1 else (2 / tensor[0].numel()) ** 0.5
            positive = name.endswith(("bn1.weight", "bn2.weight", "bn.weight", "running_var"))
            tensor.copy_(1 + 0.1 * noise.abs() if positive else spread * noise)
        if name.endswith("running_mean"):
            tensor.copy_(0.2 * torch.rand(tensor.shape, generator=draw))
    return net.eval()


def named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))
