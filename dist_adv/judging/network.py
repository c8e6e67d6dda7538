"""Anybody's network by its reference: a function of theirs, a file, the Hub, timm."""

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_adv import packages, plugins
from dist_adv.config import Reference
from dist_adv.data import Dataset
from dist_adv.distributed.collectives import main_process_first, on_every
from dist_adv.errors import UserError
from dist_adv.models import Classifier, Contiguous, check_answers, load_model
from dist_adv.models.layers import Normalize
from dist_adv.text import shown

log = logging.getLogger("dist_adv")

GROUP = "dist_adv.networks"


def load_network(chosen: Reference) -> nn.Module:
    """Return a network in eval mode, in fp32, on the CPU: images in [0, 1] to logits.

    Raises UserError saying why there is none.
    """
    prefix, colon, name = chosen.reference.partition(":")
    if prefix == "timm" and colon:
        net = _timm(name, chosen.args)
    elif (prefix == "hf" and colon) or not colon or os.path.exists(chosen.reference):
        if chosen.args:
            raise UserError(f"--model-args: {chosen.reference} is no function; leave them out")
        net = load_model(chosen.reference) if prefix == "hf" else _from_file(chosen.reference)
    else:
        net = _made(chosen.reference, chosen.args)
    while isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
        net = net.module  # which would share a rank's batch among all GPUs
    _to_fp32(net)
    return net.eval() if isinstance(net, Classifier) else Contiguous(net).eval()


def load_everywhere(
    chosen: Reference, option: str, data: Dataset, accelerator: Accelerator
) -> nn.Module:
    """Return a network for the images of `data` on every rank: on one a node first, to download.

    option: by which it was named. Raises UserError on every rank where it fails on one.
    """

    def load() -> nn.Module:
        with main_process_first(accelerator):
            network = load_network(chosen)
        check_answers(network, f"{option}: it", data.images.shape[1:], len(data.classes))
        return network

    return on_every(accelerator, load)


def digest_of(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights and buffers, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _made(reference: str, args: Mapping[str, Any]) -> nn.Module:
    """Return what a function of theirs makes of its arguments."""
    try:
        make = plugins.find(reference, GROUP, {})
    except ValueError as error:
        raise UserError(f"--model: {error}") from error
    if isinstance(make, nn.Module) and not args:
        return make
    if not callable(make) or isinstance(make, nn.Module):
        raise UserError(f"--model: {reference} is {_kind(make)} and takes no arguments")
    net = _told(f"{reference} fails", lambda: make(**args))
    if not isinstance(net, nn.Module):
        raise UserError(f"--model: {reference} returns {_kind(net)}, not a torch.nn.Module")
    return net


def _timm(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Return a network of timm's behind the normalisation that it was trained with."""
    packages.need("timm", "--model", "'dist-adv[timm]'")
    import timm

    def make() -> nn.Module:
        net = timm.create_model(name, **{"pretrained": True, **args})
        about = timm.data.resolve_model_data_config(net)
        return nn.Sequential(Normalize([*about["mean"]], [*about["std"]]), net)

    return _told(f"timm:{name} cannot be had", make)


def _from_file(reference: str) -> nn.Module:
    """Return the network of a run, an export, or a program that torch has saved."""
    path = Path(os.path.expanduser(reference))
    if not os.path.exists(path):
        raise UserError(
            f"--model: {shown(reference)}: no such file or folder; name one, module:function, "
            f"hf:USER/REPO or timm:NAME"
        )
    if path.is_dir() or path.suffix == ".safetensors":
        return load_model(path)
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
        inside = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--model: {shown(reference)}: cannot be read ({error})") from None
    if start.startswith((b"<!doctype", b"<html")):
        raise UserError(
            f"--model: {shown(reference)} is a web page and no network, as Google Drive gives one "
            f"instead of a large file; download it with a browser or gdown"
        )
    if any("/code/" in name for name in inside):
        return _told("it cannot be loaded", lambda: torch.jit.load(path, map_location="cpu"))
    if path.suffix == ".pt2":
        return Program(_told("it cannot be loaded", lambda: torch.export.load(path)))
    raise UserError(
        f"--model: {shown(reference)} is neither TorchScript nor torch.export's, which hold a "
        f"network; where it holds weights, name the function that makes the network of them"
    )


class Program(nn.Module):
    """A program of torch.export's, whose mode is part of it."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.program = program.module()

    def train(self, mode: bool = True) -> "Program":
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.program(x)


def _to_fp32(net: nn.Module) -> None:
    """Make a network's numbers fp32, in which it is judged; said where it had others."""
    kinds = {each.dtype for each in [*net.parameters(), *net.buffers()] if each.is_floating_point()}
    others = kinds - {torch.float32}
    if others:
        log.warning("--model: weights in %s are judged in fp32", ", ".join(map(str, others)))
        net.float()


def _told(what: str, make: Callable[[], Any]) -> Any:
    """Return what somebody else's code makes; its errors are UserErrors of one line."""
    try:
        return make()
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"--model: {what}: {plugins.told(error)}") from error


def _kind(thing: Any) -> str:
    return f"an object of {type(thing).__module__}.{type(thing).__qualname__}"
