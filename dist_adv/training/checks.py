"""What does not fit together, said before anything is trained."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import Config
from dist_adv.data import Dataset, place_key
from dist_adv.errors import UserError
from dist_adv.methods import Method
from dist_adv.methods.carried import BySample
from dist_adv.methods.cost import cost_of
from dist_adv.models import has_batchnorm
from dist_adv.text import few


def check_statistics(smallest_share: int, network: nn.Module) -> None:
    """Raise UserError where BatchNorm would have a single image to take statistics of."""
    if has_batchnorm(network) and smallest_share <= 1:
        raise UserError(
            "train.batch_size: leaves a rank 1 image in some batch, of which BatchNorm has no "
            "statistics; set data.drop_last=true, another batch size or model.norm=group"
        )


def check_rows(method: Method[Any]) -> None:
    """Raise UserError for a method that keeps something of every image, for generated ones, too."""
    if any(isinstance(each, BySample) for each in method.carried().values()):
        raise UserError(
            f"data.extra: {method.options.name} keeps a row of every training image, which the "
            f"generated ones have none of; use another method"
        )


def check_divides(batch: int, parts: int, ranks: int) -> None:
    """Raise UserError for a batch that ranks cannot take in so many equal parts each."""
    if parts > 1 and batch % (parts * ranks):
        raise UserError(
            f"train.accumulate: a batch of {batch} does not divide into {parts} parts on each of "
            f"{ranks} rank(s); use a multiple of {parts * ranks} for train.batch_size"
        )


def check_parts(config: Config) -> None:
    """Raise UserError for a method that cannot take a batch in parts (`train.accumulate`)."""
    if config.train.accumulate > 1:
        threat = build_threat(config.threat.norm, config.threat.eps)
        if cost_of(config.method, threat).whole_batch:
            raise UserError(
                f"train.accumulate: {config.method.name} computes over whole batches, or keeps "
                f"something for each position of one; use 1, or more ranks"
            )


def check_pictures(method: Method[Any], shape: Sequence[int]) -> None:
    """Raise UserError for a method that keeps what has the size of images, (C, H, W)."""
    for each in method.carried().values():
        kept = each.rows if isinstance(each, BySample) else getattr(each, "value", None)
        if kept is not None and tuple(kept.shape[-3:]) == tuple(shape):
            raise UserError(
                f"data.size: {method.options.name} keeps perturbations from epoch to epoch, which "
                f"have one size; give one, or use another method"
            )


def check_strides(accelerator: Accelerator, network: nn.Module, shape: Sequence[int]) -> None:
    """Raise UserError where this CPU computes wrong gradients of a network's weights in bf16.

    On CPUs with AMX oneDNN (3.12, torch 2.14.1) reads memory that nobody wrote for the weights'
    gradient of a bf16 convolution whose stride is larger than its map: NaN, or silently a wrong
    number (benchmarks/results/2026-11-27-amx.md). Such a stride is a ResNet's for images of 8x8
    or 16x16 pixels.

    Args:
        network: on its device; left in eval mode.
        shape: (C, H, W) of an image.
    """
    if accelerator.mixed_precision != "bf16" or accelerator.device.type != "cpu" or not has_amx():
        return
    found: list[str] = []

    def look(name: str, module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        size = inputs[0].shape[-2:]
        sides = zip(module.kernel_size, module.stride, size, strict=True)
        if any(kernel > 1 and stride > side for kernel, stride, side in sides):
            found.append(f"{name} (stride {max(module.stride)}, a map of {size[0]}x{size[1]})")

    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: look(name, module, inputs)
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        network.eval()(torch.full((1, *shape), 0.5))
    for hook in hooks:
        hook.remove()
    if found:
        raise UserError(
            f"train.precision: in bf16 this CPU (AMX) computes wrong gradients of convolutions "
            f"that stride over more than their map: {few(found)}; use fp32, or larger images"
        )


def has_amx() -> bool:
    """Whether bf16 products are computed in AMX tiles."""
    supported: Any = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    return bool(supported())


def check_splits(train: Dataset, test: Dataset) -> None:
    """Raise UserError where the splits have other classes, or images of other sizes."""
    key = place_key(train.name)
    for one, name, other in ((train, "train", test), (test, "test", train)):
        missing = [each for each in one.classes if each not in set(other.classes)]
        if missing:
            raise UserError(
                f"{key}: the train split has {len(train.classes)} classes and the test split "
                f"{len(test.classes)}; {len(missing)} are in the {name} split alone "
                f"({few(missing)}); they must be the same"
            )
    if train.classes != test.classes:
        raise UserError(
            f"{key}: the train split has the classes in another order ({few(train.classes)}) than "
            f"the test split ({few(test.classes)}); they must be in the same"
        )
    (height, width), (h, w) = train.images.shape[2:], test.images.shape[2:]
    if (height, width) != (h, w):
        raise UserError(
            f"data.size: the images for training are {width}x{height} and those for testing "
            f"{w}x{h} pixels; set data.size, for example data.size={min(height, width)}"
        )
