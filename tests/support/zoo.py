"""A stand-in for RobustBench's networks: their names, arguments and keys, and code of our own.

robustbench itself pins versions that the tests do not have. `make()` is its module tree.
"""

import sys
from types import ModuleType

import public_networks


class PreActBlock:
    """Names a block whose projection is of its raw input."""


class PreActBlockV2:
    """Names one whose projection is of its activated input."""


class PreActResNet(public_networks.PreActResNet):
    def __init__(
        self, block: type, num_blocks: list[int], num_classes: int = 10, bn_before_fc: bool = False
    ) -> None:
        raw = block is PreActBlock
        super().__init__(raw, bn_before_fc, 64, num_classes, tuple(num_blocks))


class WideResNet(public_networks.WideResNet):
    def __init__(self, depth: int = 28, num_classes: int = 10, widen_factor: int = 10) -> None:
        super().__init__(depth, widen_factor, num_classes, width=16)


def make() -> dict[str, ModuleType]:
    """What `sys.modules` has where robustbench is imported."""
    names = ("robustbench", "robustbench.model_zoo", "robustbench.model_zoo.architectures")
    modules = {name: ModuleType(name) for name in names}
    here = sys.modules[__name__]
    return {**modules, f"{names[-1]}.resnet": here, f"{names[-1]}.wide_resnet": here}
