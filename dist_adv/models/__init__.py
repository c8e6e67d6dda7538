"""Networks: float NCHW images in [0, 1] to logits, normalisation inside as buffers.

A model is described by a small JSON-able dictionary, its architecture, which travels in the
metadata of every `model.safetensors`: a weights file alone is enough to rebuild the network.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, SerializeAsAny, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dist_adv import files, packages, plugins, rng
from dist_adv.errors import RunFailure, UserError
from dist_adv.models import libraries
from dist_adv.models.layers import Normalize, NormKind
from dist_adv.models.libraries import TimmOptions, TorchvisionOptions
from dist_adv.models.options import ModelOptions
from dist_adv.models.preact_resnet import PreActResNet18, Shortcut
from dist_adv.models.resnet import ResNet50
from dist_adv.models.wide_resnet import WideResNet
from dist_adv.options import Open, PositiveInt
from dist_adv.text import one_line

GROUP = "dist_adv.models"
_HUB = "hf:"


class PreActResNet18Options(ModelOptions):
    """PreActResNet18 as in the papers; `width` is the channels of its first stage.

    shortcut: where a block's projection starts, at its activated or its raw input (Wong et al.).
    final_norm: a norm and an activation before the pooling, which some copies lack.
    """

    name: str = "preact_resnet18"
    width: PositiveInt = 64
    norm: NormKind = "batch"
    shortcut: Shortcut = "activated"
    final_norm: bool = True


class WideResNetOptions(ModelOptions):
    """WRN-depth-widen; depth 32 is the network of Madry et al. and of the Free paper."""

    name: str = "wide_resnet"
    depth: PositiveInt = 34
    widen: PositiveInt = 10
    width: PositiveInt = 16
    norm: NormKind = "batch"

    @field_validator("depth")
    @classmethod
    def _known_depth(cls, depth: int) -> int:
        if depth < 8 or depth % 6 not in (2, 4):
            raise ValueError(f"{depth} is not 6n + 4 (28, 34) or 6n + 2 (32)")
        return depth


class ResNet50Options(ModelOptions):
    """ResNet50; `stem: imagenet` halves the resolution twice before the first stage."""

    name: str = "resnet50"
    stem: Literal["cifar", "imagenet"] = "cifar"
    width: PositiveInt = 64
    norm: NormKind = "batch"


_OWN: dict[str, tuple[type[ModelOptions], Callable[..., nn.Module]]] = {
    "preact_resnet18": (PreActResNet18Options, PreActResNet18),
    "wide_resnet": (WideResNetOptions, WideResNet),
    "resnet50": (ResNet50Options, ResNet50),
    "timm": (TimmOptions, libraries.timm_network),
    "torchvision": (TorchvisionOptions, libraries.torchvision_network),
}


_LIBRARIES = (TimmOptions, TorchvisionOptions)


def find_options(name: str, may_import: bool = True) -> type[ModelOptions]:
    """Return the options of a network: dist_adv's own, a package's, or that of a reference.

    may_import: as of `plugins.find`. Raises ValueError where there is none, saying why.
    """
    if name in _OWN:
        return _OWN[name][0]
    return plugins.options_of(name, plugins.find(name, GROUP, _OWN, may_import), ModelOptions)


ModelChoice = Annotated[
    SerializeAsAny[ModelOptions],
    Open(lambda: {name: options for name, (options, _) in _OWN.items()}, find_options),
]
"""The section `model` of a configuration."""


def _network(options: Mapping[str, Any], channels: int, classes: int) -> nn.Module:
    """Return a new network. Somebody's own is made from its options object."""
    settings = dict(options)
    name = settings.pop("name")
    if name in _OWN:
        settings.pop("pretrained", None)  # was where it started; its weights are in the file
        return _OWN[name][1](in_channels=channels, num_classes=classes, **settings)
    kind = plugins.find(name, GROUP, _OWN, may_import=False)
    return kind(kind.Options.model_validate(dict(options)), channels, classes)


class Classifier(nn.Module):
    """A network behind its normalisation; `architecture` says how to build it again.

    net: where it is built already.
    """

    def __init__(self, architecture: dict[str, Any], net: nn.Module | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.normalize = Normalize(architecture["mean"], architecture["std"])
        self.net = net or _network(
            architecture["model"], len(architecture["mean"]), len(architecture["classes"])
        )
        self.channels_last = takes_channels_last(architecture["model"]["name"])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, classes) for images (n, channels, height, width), float in [0, 1].

        Raises ValueError or TypeError for other tensors: normalising would broadcast one channel
        to three and turn bytes into floats of up to 255, and the answers would mean nothing.
        """
        if not (torch.jit.is_scripting() or torch.jit.is_tracing()):  # no branch on a size there
            check_images(images, len(self.architecture["mean"]))
        x = self.normalize(images)
        return self.net(x if self.channels_last else x.contiguous())


class Contiguous(nn.Module):
    """Somebody's network, given images as `x.view(len(x), -1)` needs them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.contiguous())


def check_images(x: Tensor, channels: int) -> None:
    """Raise ValueError or TypeError where x is no float batch of this many channels."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"images of shape (n, {channels}, height, width) are needed, not {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"images must be float in [0, 1], not {x.dtype}; use x.float() / 255")


torch.fx.wrap("check_images")  # a step of a symbolic trace, and not a branch in it


class _Architecture(BaseModel):
    """What the metadata of a weights file must say, at least."""

    model: dict[str, Any]
    mean: list[float]
    std: list[float]
    classes: list[str]


def is_somebodys(name: str) -> bool:
    """Tell whether a network is not dist_adv's."""
    return name not in _OWN


def takes_pixels(name: str) -> bool:
    """Tell whether a network normalises images itself: somebody's own with `normalize = False`."""
    return not _says(name, "normalize", True)


def takes_channels_last(name: str) -> bool:
    """Tell whether a network has that layout: somebody's own with `channels_last = True`.

    One of convolutions is faster in it, and one with `x.view(len(x), -1)` fails.
    """
    return _says(name, "channels_last", False)


def _says(name: str, attribute: str, default: bool) -> bool:
    """Return what somebody's own network says of itself; dist_adv's own says yes to both."""
    if not is_somebodys(name):
        return True
    found = plugins.find(name, GROUP, _OWN, may_import=False)
    return bool(getattr(found, attribute, default))


def describe(options: ModelOptions, size: Sequence[int]) -> dict[str, Any]:
    """Return what a weights file says of a network for images of (H, W).

    Raises UserError where a library does not know it.
    """
    if isinstance(options, _LIBRARIES):
        return libraries.describe(options, size)
    return options.model_dump()


def _library(name: str) -> str | None:
    """Return the library that a kind of network comes from, with its version."""
    found = name in _OWN and issubclass(_OWN[name][0], _LIBRARIES)
    return f"{name} {packages.version(name)}" if found else None


def build_model(
    options: ModelOptions,
    mean: list[float],
    std: list[float],
    classes: list[str],
    seed: int,
    size: Sequence[int] = (32, 32),
    pretrained: bool = True,
) -> Classifier:
    """Return a new network whose initial weights depend on the seed alone.

    Args:
        mean, std: of the images, a channel; published weights come with their own.
        size: (H, W) of the images, for networks that are made for one size.
        pretrained: false takes no published weights, whatever the options say.

    Raises UserError where a library has no such network or its published weights cannot be had.
    """
    if takes_pixels(options.name):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    described, net = describe(options, size), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.stream_key(seed, "weights") & (2**63 - 1))
        if isinstance(options, _LIBRARIES) and options.pretrained and pretrained:
            settings = options.model_dump(exclude={"name"}) | {"args": described["args"]}
            net = _OWN[options.name][1](len(mean), len(classes), **settings)
            mean, std = libraries.normalisation(options, net, len(mean))
        architecture: dict[str, Any]
        architecture = {"model": described, "mean": mean, "std": std, "classes": classes}
        if isinstance(options, _LIBRARIES):
            architecture["library"] = _library(options.name)
        model = Classifier(architecture, net)
    return model.to(memory_format=torch.channels_last) if model.channels_last else model


def has_batchnorm(network: nn.Module) -> bool:
    """Tell whether an image's logits depend on the others of its batch in training."""
    return any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in network.modules())


def check_answers(
    model: nn.Module,
    subject: str,
    shape: Sequence[int],
    classes: int,
    more: bool = False,
    training: bool = False,
) -> None:
    """Raise UserError where a network of somebody's own fails on two images, or answers amiss.

    Leaves it in the mode that it was asked in: eval mode, or `training`, which moves BatchNorm's
    statistics.

    Args:
        subject: what the message begins with.
        shape: (C, H, W) of an image.
        classes: how many logits an image has; with `more`, at least.
    """
    device = next(iter([*model.parameters(), *model.buffers()]), torch.zeros(0)).device
    images = torch.full((2, *shape), 0.5, device=device)
    mode = " in train mode" if training else ""
    try:
        with torch.no_grad():
            logits = model.train(training)(images)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{subject} fails{mode} on images of shape {tuple(images.shape)}: {plugins.told(error)}"
        ) from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != (2, classes) and not (
        more and isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] > classes
    ):
        raise UserError(
            f"{subject} returns {found}{mode} for 2 images of {classes} classes; return logits of "
            f"shape (n, classes)"
        )


def save_model(path: Path, architecture: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Weights, and the architecture as metadata, in one safetensors file, whole or not at all."""
    # Copies: two names of one layer's weights share memory, which the format has no word for.
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()
    }
    # Not save_file, whose files only their owner may read.
    files.replace(path, save(tensors, {"architecture": json.dumps(architecture)}))


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(architecture, tensors) of a weights file.

    Raises UserError where the file is missing, damaged, or not one of this project's.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such weights file; has the run finished?")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        architecture = json.loads(metadata["architecture"])
        model = _Architecture.model_validate(architecture).model
        if str(model["name"]) in _OWN:  # somebody's own are checked where the network is built
            architecture["model"] = find_options(model["name"]).model_validate(model).model_dump()
    except (KeyError, ValueError, RecursionError):  # pydantic's errors are ValueErrors
        raise UserError(f"{path}: has no architecture of dist_adv in its metadata") from None
    return architecture, tensors


def read_final(path: Path) -> dict[str, Any]:
    """Return the architecture of a finished run's weights, which says how they were trained, too.

    Raises UserError as `read_weights` does, and for the weights of a checkpoint.
    """
    architecture, _ = read_weights(path)
    if not {"trained", "threat"} <= architecture.keys():
        raise UserError(f"{path}: weights of a checkpoint and not of a finished run; name a run")
    return architecture


def weights_file(path: str | Path) -> Path:
    """Return the weights of a run or export folder, of the Hub, or the file that is named itself.

    Raises UserError where the Hub has none, RunFailure where it cannot be reached.
    """
    if str(path).startswith(_HUB):
        return _downloaded(str(path))
    path = Path(os.path.expanduser(path))
    # Not is_dir, which raises for a folder without permission; read_weights says what is wrong.
    return path / "model.safetensors" if os.path.isdir(path) else path


def _downloaded(name: str) -> Path:
    """Return the weights file of `hf:USER/REPO`: the cached one where that is still the newest."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = snapshot_download(name.removeprefix(_HUB), allow_patterns="model.safetensors")
    except HFValidationError:
        raise UserError(f"{name}: no name of a repository; write hf:USER/REPO") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such repository on the Hub, or a private one; check the name, or run "
            f"`hf auth login`"
        ) from None
    except LocalEntryNotFoundError as error:
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        raise RunFailure(
            f"{name}: the Hub cannot be reached{reason}, and the cache does not have it"
        ) from None
    except (OSError, HTTPError) as error:
        raise RunFailure(f"{name}: could not be downloaded ({one_line(error)})") from None
    path = Path(folder, "model.safetensors")
    if not path.exists():
        raise UserError(f"{name}: has no model.safetensors; name an export of dist-adv")
    return path


def _moved(architecture: dict[str, Any]) -> str:
    """Return the end of a complaint about weights that another version of a library made."""
    then, now = architecture.get("library"), _library(architecture["model"]["name"])
    return f"; they were made with {then}, and this is {now}" if then != now else ""


def load_model(path: str | Path) -> Classifier:
    """Return the trained network of a run folder, an export folder or a `model.safetensors`.

    Returns it in eval mode, in fp32, on the CPU: images (n, C, H, W), float in [0, 1], to
    logits (n, classes). foolbox, torchattacks, ART, RobustBench and AutoAttack take it as it is.

    Args:
        path: or `hf:USER/REPO`, whose `model.safetensors` is downloaded from the Hugging Face Hub.

    Raises UserError where there is no such file, or one that is damaged or not this project's;
    RunFailure where the Hub cannot be reached.
    """
    architecture, tensors = read_weights(weights_file(path))
    try:
        model = Classifier(architecture)
    except ValueError as error:
        raise UserError(f"{path}: its network {error}") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip()[:200]  # torch names every tensor
        raise UserError(
            f"{path}: weights do not fit their architecture ({problem}){_moved(architecture)}"
        ) from None
    # Not with channels last, as it was trained: the input gradients of such a network have that
    # layout, too, and other libraries call `.view(n, -1)` on them.
    return model.eval()
