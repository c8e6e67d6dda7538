"""Checkpoints of somebody else's code: read without executing anything, unpacked, unwrapped."""

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dist_adv import files
from dist_adv.errors import UserError
from dist_adv.text import few, said

# Where training scripts put the weights, in the order in which they are looked for.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "last", "best")
_OTHER_WEIGHTS = (*_CONTAINERS, "unaveraged_model_state_dict")
# What DataParallel, torch.compile, attack libraries and nn.Sequential(normalise, net) prefix.
_WRAPPERS = r"(?:(?:module|model|base_model|_orig_mod|net|[01])\.)*"
_NORMALISATION = re.compile(_WRAPPERS + r"(?:normali[sz]\w*\.)?(?:(mu|mean)|(sigma|std))")


@dataclass(frozen=True)
class Foreign:
    """The weights of a checkpoint by their names within the network.

    format: how they were packed, in words. mean, std: of a normalisation that is in the file.
    notes: what was decided about it, a sentence each.
    """

    sha256: str
    format: str
    weights: dict[str, Tensor]
    mean: list[float] | None
    std: list[float] | None
    notes: list[str]


def read_foreign(path: Path, first: str) -> Foreign:
    """Read a checkpoint of torch.save or a safetensors file; nothing in it is executed.

    first: the name within the network of a tensor by which wrappers' prefixes are told.

    Raises UserError for what is no such file, or holds no weights.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name the checkpoint file in it")
    sha256 = files.sha256(path) if os.path.isfile(path) else None
    if sha256 is None:
        reason = "cannot be read" if os.path.exists(path) else "no such file"
        raise UserError(f"{path}: {reason}; name a checkpoint that is there")
    notes: list[str] = []
    kind, content = _read(path)
    state, places = _unpack(content, path, notes)
    prefix = _prefix(state, first, path)
    inside = {match: state[match.string] for match in map(_NORMALISATION.fullmatch, state) if match}
    mean, std = _constants(inside, path)
    norms = {match.string for match in inside}
    outside = [key for key in state if not key.startswith(prefix) and key not in norms]
    if outside:
        raise UserError(f"{path}: has {few(outside)} beside the network, which is {prefix}*")
    dtypes = {str(each.dtype).removeprefix("torch.") for each in state.values()}
    if rounded := sorted(dtypes & {"float16", "bfloat16", "float64"}):
        notes.append(f"{' and '.join(rounded)} becomes float32.")
    return Foreign(
        sha256,
        ", ".join([kind, *places, *([f"prefix {prefix}"] if prefix else [])]),
        {key.removeprefix(prefix): each for key, each in state.items() if key not in norms},
        mean,
        std,
        notes,
    )


def _read(path: Path) -> tuple[str, Any]:
    """Return the kind of a file and what is in it. Raises UserError."""
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise UserError(f"{path}: is empty; download it again")
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        raise UserError(
            f"{path}: is a web page and no checkpoint, as Google Drive gives it where a large file "
            f"needs a confirmation; download the file in a browser or with gdown"
        )
    try:
        if head[8:9] == b"{":  # after the length of its header
            with safe_open(path, framework="pt") as file:
                if "architecture" in (file.metadata() or {}):
                    raise UserError(
                        f"{path}: is of this project already; name it in train.start or load_model"
                    )
                names = file.keys()
                return "safetensors", {name: file.get_tensor(name) for name in names}
        with warnings.catch_warnings(action="ignore"):  # of pickles and TorchScript
            return "torch.save", torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_unsafe(str(error))}") from None
    except Exception as error:  # whatever a damaged file comes up with
        signs = ("central directory", "EOF", "Incomplete", "incomplete")
        if "TorchScript" in str(error):
            what = "is a TorchScript program and not a checkpoint; save its state_dict()"
        elif any(sign in str(error) for sign in signs):
            what = "is cut short; download it again"
        else:
            what = f"is no checkpoint that can be read ({said(error)[:120]})"
        raise UserError(f"{path}: {what}") from None


def _unsafe(error: str) -> str:
    """Return what to say of a pickle that PyTorch's unpickler of weights refuses."""
    named = re.search(r"GLOBAL (\S+)", error)
    if named:
        return (
            f"holds more than tensors ({named[1]}), which could run code and was not opened; where "
            f"you trust it, load it with its own code and torch.save(model.state_dict(), FILE)"
        )
    return "is neither a checkpoint of torch.save nor a safetensors file"


def _unpack(content: Any, path: Path, notes: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by name and the keys below which they were found."""
    places: list[str] = []
    while not _is_state(content):
        inner = content if isinstance(content, Mapping) else {}
        weights = [key for key in _OTHER_WEIGHTS if isinstance(inner.get(key), Mapping)]
        if not weights or weights[0] not in _CONTAINERS:
            found = few([str(key) for key in inner]) or type(content).__name__
            raise UserError(
                f"{path}: holds no weights by name ({found}); torch.save(model.state_dict(), FILE)"
            )
        if weights[1:]:
            notes.append(f"Of {few(weights)} the weights in {weights[0]} were taken.")
        places.append(weights[0])
        content = inner[weights[0]]
    return dict(content), places


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) for key in content)
        and all(isinstance(each, Tensor) and _is_plain(each) for each in content.values())
    )


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def _prefix(state: Mapping[str, Tensor], first: str, path: Path) -> str:
    """Return what wrappers have put before every name within the network."""
    pattern = re.compile(f"({_WRAPPERS}){re.escape(first)}")
    found = [match[1] for match in map(pattern.fullmatch, state) if match]
    if not found:
        raise UserError(
            f"{path}: has no {first} (but {few(list(state))}); is --as the network that it is of?"
        )
    return min(found, key=len)


def _constants(
    inside: Mapping[re.Match[str], Tensor], path: Path
) -> tuple[list[float] | None, list[float] | None]:
    """Return mean and standard deviation a channel where the file has them."""
    means = [each for match, each in inside.items() if match[1]]
    stds = [each for match, each in inside.items() if match[2]]
    if len(means) != len(stds) or len(means) > 1:
        names = few([match.string for match in inside])
        raise UserError(f"{path}: {names} are no mean and standard deviation of a normalisation")
    if not means:
        return None, None
    return means[0].flatten().tolist(), stds[0].flatten().tolist()
