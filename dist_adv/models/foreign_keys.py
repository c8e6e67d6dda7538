"""Public names of the parameters of networks that are here, too, and what their shapes decide.

pytorch-cifar (kuangliu), fast_adversarial (Wong et al.), robust_overfitting (Rice et al.), TRADES
(Zhang et al.), AWP (Wu et al.) and RobustBench call the layers of a network the same. The table
`PUBLIC` pairs these names with ours; `public_keys` is a bijection, so it serves for writing too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_adv.text import few


@dataclass(frozen=True)
class Names:
    """Public names of a network's modules, by ours.

    block: the prefix of a block, `stage` counted from 1 and `block` from 0 in each stage.
    in_block, around: modules of a block, and those outside of blocks.
    """

    stages: int
    block: str
    in_block: Mapping[str, str]
    around: Mapping[str, str]


_BLOCK = {"norm1": "bn1", "conv1": "conv1", "norm2": "bn2", "conv2": "conv2"}
PUBLIC = {
    "preact_resnet18": Names(
        stages=4,
        block="layer{stage}.{block}.",
        in_block={**_BLOCK, "shortcut": "shortcut.0"},
        around={"stem": "conv1", "norm": "bn", "linear": "linear"},
    ),
    "wide_resnet": Names(
        stages=3,
        block="block{stage}.layer.{block}.",
        in_block={**_BLOCK, "shortcut": "convShortcut"},
        around={"stem": "conv1", "norm": "bn1", "linear": "fc"},
    ),
}
"""By the name of the network in the section `model`."""

# RobustBench's and TRADES' WideResNets have a copy of the first stage that no forward pass uses.
_UNUSED = ("sub_block1.",)
_COUNTER = "num_batches_tracked"


def public_keys(network: str, ours: Iterable[str]) -> dict[str, str]:
    """Return the public name of each key of a network's state.

    Args:
        network: a key of `PUBLIC`.
        ours: all keys of `Classifier.net.state_dict()`: without `net.` and the normalisation.
    """
    names, ours = PUBLIC[network], list(ours)
    numbers = [int(key.split(".")[1]) for key in ours if key.startswith("blocks.")]
    blocks = (max(numbers) + 1) // names.stages
    return {key: _public_key(key, names, blocks) for key in ours}


def _public_key(key: str, names: Names, blocks: int) -> str:
    """Return the public name of one key; `blocks` are those of a stage."""
    module, _, tensor = key.rpartition(".")
    if not module.startswith("blocks."):
        return f"{names.around[module]}.{tensor}"
    _, number, module = module.split(".")
    stage, block = divmod(int(number), blocks)
    place = names.block.format(stage=stage + 1, block=block)
    return f"{place}{names.in_block[module]}.{tensor}"


@dataclass(frozen=True)
class Sizes:
    """What the tensors of a network say: options of `model`, channels of an image, classes."""

    options: dict[str, Any]
    channels: int
    classes: int


def sizes(network: str, theirs: Mapping[str, Tensor]) -> Sizes:
    """Return what names and shapes decide of a state with public names.

    Raises ValueError naming a layer that is missing, or a shape that no such network has.
    """
    names = PUBLIC[network]
    stem = _weight(theirs, names.around["stem"], 4)
    head = _weight(theirs, names.around["linear"], 2)
    width = stem.shape[0]
    options: dict[str, Any] = {"width": width, "norm": "batch"}
    if network == "preact_resnet18":
        options["final_norm"] = f"{names.around['norm']}.weight" in theirs
    else:
        first = _weight(theirs, names.block.format(stage=1, block=0) + "conv1", 4)
        blocks = 1
        while names.block.format(stage=1, block=blocks) + "conv1.weight" in theirs:
            blocks += 1
        projections = any(names.in_block["shortcut"] in key for key in theirs)
        options |= {
            "depth": 6 * blocks + (4 if projections else 2),
            "widen": max(1, first.shape[0] // width),
        }
    return Sizes(options, channels=stem.shape[1], classes=head.shape[0])


def _weight(theirs: Mapping[str, Tensor], module: str, dimensions: int) -> Tensor:
    key = f"{module}.weight"
    if key not in theirs:
        raise ValueError(f"has no {key}")
    if theirs[key].dim() != dimensions or 0 in theirs[key].shape:
        raise ValueError(f"{key} is of shape {tuple(theirs[key].shape)}")
    return theirs[key]


def take(
    network: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], unused: str = ""
) -> dict[str, Tensor]:
    """Return a state with our names and public weights; BatchNorm's counters stay ours.

    Args:
        ours: the state of a network of the same options, for its names and shapes.
        unused: the prefix of further public names that are passed over, where there is one.

    Raises ValueError naming layers that are missing, that are more, or are of another shape.
    """
    public = public_keys(network, ours)
    wanted = {key: name for key, name in public.items() if not key.endswith(_COUNTER)}
    missing = [name for name in wanted.values() if name not in theirs]
    if missing:
        raise ValueError(f"has no {few(missing)}")
    needless = (*_UNUSED, unused) if unused else _UNUSED
    known = set(wanted.values())
    more = [
        name
        for name in theirs
        if name not in known and not name.startswith(needless) and not name.endswith(_COUNTER)
    ]
    if more:
        raise ValueError(f"also has {few(more)}")
    for key, name in wanted.items():
        if theirs[name].shape != ours[key].shape:
            raise ValueError(
                f"{name} is of shape {tuple(theirs[name].shape)}, not {tuple(ours[key].shape)}"
            )
    return {**ours, **{key: theirs[name] for key, name in wanted.items()}}
