"""Networks of timm and of torchvision, by their names there.

Whatever a name stands for on the Hub or in a folder is resolved when the network is made, and its
image size where it has only one: a weights file says all that building it again takes.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from torch import nn

from dist_adv import packages
from dist_adv.errors import UserError
from dist_adv.models.options import ModelOptions
from dist_adv.options import Real
from dist_adv.text import said

# The data give the first two. The others read files, which the metadata of a weights file may not.
_OURS = {"in_chans", "num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_OURS |= {"checkpoint_path", "weights", "weights_backbone"}
_TWO_HEADS = ("googlenet", "inception_v3")


class _LibraryOptions(ModelOptions):
    """arch: the network's name there. pretrained: start from its published weights, with their
    normalisation and a new last layer. args: whatever else its function takes."""

    arch: str
    pretrained: bool = False
    args: dict[str, Any] = {}

    @field_validator("args")
    @classmethod
    def _not_ours(cls, args: dict[str, Any]) -> dict[str, Any]:
        for key in args.keys() & _OURS:
            raise ValueError(f"{key}: the data say it, or model.pretrained; leave it out")
        return args


class TimmOptions(_LibraryOptions):
    """A network of timm. arch may be hf-hub:USER/REPO or local-dir:FOLDER, too.

    stem: `conv` puts 3x3 convolutions of stride 2 in place of the patches of a ConvNeXt or ViT
    (Singh et al. 2023). drop_path: the largest share of residual branches left out in training.
    """

    name: str = "timm"
    stem: Literal["default", "conv"] = "default"
    drop_path: Annotated[Real, Field(ge=0, lt=1)] = 0.0


class TorchvisionOptions(_LibraryOptions):
    """A network of torchvision for images of three channels."""

    name: str = "torchvision"


def timm_network(
    in_channels: int,
    num_classes: int,
    arch: str,
    stem: str = "default",
    drop_path: float = 0.0,
    pretrained: bool = False,
    args: Mapping[str, Any] = {},
) -> nn.Module:
    """Return a network of timm. Raises UserError where there is none such."""
    timm = _timm()
    rate = {"drop_path_rate": drop_path} if drop_path else {}
    with _complaints("timm", arch, timm.list_models):
        net = timm.create_model(
            arch, pretrained, in_chans=in_channels, num_classes=num_classes, **rate, **args
        )
    if stem == "conv":
        _convolve_stem(net, arch, in_channels)
    return net


def torchvision_network(
    in_channels: int,
    num_classes: int,
    arch: str,
    pretrained: bool = False,
    args: Mapping[str, Any] = {},
) -> nn.Module:
    """Return a network of torchvision. Raises UserError where there is none such."""
    from torchvision import models

    if in_channels != 3:
        raise UserError(
            f"model.name: torchvision's networks take 3 channels, and these images have "
            f"{in_channels}; use model.name=timm"
        )
    if pretrained and arch in (*_TWO_HEADS, "squeezenet1_0", "squeezenet1_1"):
        raise UserError(
            f"model.pretrained: the published weights of {arch} do not fit what is trained here; "
            f"use false, or model.name=timm"
        )
    with _complaints("torchvision", arch, models.list_models):
        if not pretrained:
            return models.get_model(arch, num_classes=num_classes, **args)
        net = models.get_model(arch, weights="DEFAULT", **args)
    path, last = [each for each in net.named_modules() if isinstance(each[1], nn.Linear)][-1]
    if last.out_features != num_classes:
        net.set_submodule(path, nn.Linear(last.in_features, num_classes))
    return net


def describe(options: TimmOptions | TorchvisionOptions, size: Sequence[int]) -> dict[str, Any]:
    """Return the options of a network for images of (H, W) that need no Hub and no folder.

    Raises UserError where the network's name, or what it stands for, is not known.
    """
    arch, args = options.arch, dict(options.args)
    if isinstance(options, TorchvisionOptions):
        if arch.startswith("vit_"):
            args.setdefault("image_size", size[0])
        if arch in _TWO_HEADS:  # they would answer with a tuple in training
            args |= {"aux_logits": False, "init_weights": True}
        return options.model_dump() | {"args": args}
    timm = _timm()
    known: dict[str, Any] | None = None
    source, _, place = arch.partition(":")
    with _complaints("timm", arch, timm.list_models):
        if source == "hf-hub":
            _, arch, known = timm.models.load_model_config_from_hf(place)
        elif source == "local-dir":
            config = json.loads(Path(place, "config.json").read_text())
            arch, known = config["architecture"], config.get("model_args")
        else:
            arch = arch.partition(".")[0]  # what follows says which weights
    args = {key: value for key, value in (known or {}).items() if key not in _OURS} | args
    if timm.is_model(arch) and timm.models.get_pretrained_cfg_value(arch, "fixed_input_size"):
        args.setdefault("img_size", list(size))
    return options.model_dump() | {"arch": arch, "args": args}


def normalisation(
    options: TimmOptions | TorchvisionOptions, net: nn.Module, channels: int
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation a channel that published weights were trained with.

    Where timm fits the weights of the first layer to another number of channels than theirs, it is
    the mean of theirs for each.
    """
    if isinstance(options, TimmOptions):
        known: Any = net.pretrained_cfg
        mean, std = list(known["mean"]), list(known["std"])
        if len(mean) != channels:
            mean, std = ([sum(each) / len(each)] * channels for each in (mean, std))
        return mean, std
    from torchvision import models

    transforms = models.get_model_weights(options.arch).DEFAULT.transforms()
    return list(transforms.mean), list(transforms.std)


def _timm() -> Any:
    packages.need("timm", "model.name: timm", "'dist-adv[timm]'")
    import timm

    return timm


@contextmanager
def _complaints(library: str, arch: str, names: Callable[[], list[str]]) -> Iterator[None]:
    """Turn what a library raises for a name and its arguments into one line."""
    try:
        yield
    except OSError as error:
        remedy = "use model.pretrained=false"
        if library == "timm":
            remedy += ", or model.arch=local-dir:FOLDER with its config.json and weights"
        raise UserError(f"model.arch: {arch}: cannot be had ({said(error)}); {remedy}") from error
    except Exception as error:
        plain = arch.partition(".")[0]
        if ":" in arch or plain in names():
            problem = f"{library} cannot make it ({said(error)}); mend model.arch or model.args"
        else:
            near = difflib.get_close_matches(plain, names(), n=1)
            others = f"did you mean {near[0]!r}?" if near else f"{library}.models.list_models()"
            problem = f"is not known to {library}; {others}"
        raise UserError(f"model.arch: {arch}: {problem}") from error


def _convolve_stem(net: nn.Module, arch: str, channels: int) -> None:
    """Put strided 3x3 convolutions, each with a norm and a GELU, in place of a network's patches.

    As many as halve the images to the same size; the last has the network's first width, each
    before it half of the next.
    """
    from timm.models import ConvNeXt, VisionTransformer

    if isinstance(net, ConvNeXt):
        patches: Any = net.stem[0]
        net.stem = _convolutions(channels, patches, arch)
    elif isinstance(net, VisionTransformer):
        patches = net.patch_embed.proj
        width = patches.out_channels
        stem = _convolutions(channels, patches, arch)
        net.patch_embed.proj = nn.Sequential(*stem, nn.Conv2d(width, width, 1))
    else:
        raise UserError(f"model.stem: {arch} is no ConvNeXt and no ViT; use stem=default")


def _convolutions(channels: int, patches: nn.Conv2d, arch: str) -> nn.Sequential:
    from timm.layers import LayerNorm2d

    halvings = math.log2(patches.stride[0])
    if halvings % 1 or patches.out_channels % 2 ** (int(halvings) - 1):
        raise UserError(
            f"model.stem: {arch} has patches of {patches.stride[0]} pixels and "
            f"{patches.out_channels} channels, which no halvings make; use stem=default"
        )
    layers: list[nn.Module] = []
    for left in reversed(range(int(halvings))):
        width = patches.out_channels >> left
        layers += [nn.Conv2d(channels, width, 3, 2, 1), LayerNorm2d(width), nn.GELU()]
        channels = width
    return nn.Sequential(*layers)
