"""What trains a network: DDP, DeepSpeed's ZeRO, FSDP2. Elsewhere nobody knows which.

The launcher chooses (`launch/accelerate/`) and tells every process by a variable of Accelerate's.
Each engine is a `TrainNet`: the network as methods see it, its optimiser, and the weights and
momentum in whole, so that a checkpoint of one engine goes on under another.
"""

import os
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from dist_adv.config import Config
from dist_adv.distributed.ddp import TrainNet
from dist_adv.distributed.deepspeed import ZeroNet, start_deepspeed
from dist_adv.distributed.fsdp2 import ShardedNet, start_fsdp2
from dist_adv.errors import UserError
from dist_adv.methods import find_method

_TRUE, _FALSE = {"1", "true", "t", "yes", "y", "on"}, {"0", "false", "f", "no", "n", "off"}
_FLAG = (frozenset(_TRUE | _FALSE), "write true or false")  # as Accelerate reads them
_OFF = frozenset({"false"})
_ENGINE = (frozenset({"true", "false"}), "write true or false")

# Variables by which Accelerate would train another network, or fail: the values that do neither,
# among them those that `accelerate launch` sets by itself, and what to do about any other.
_VARIABLES: dict[str, tuple[frozenset[str], str]] = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        frozenset({"1", "auto"}),
        "unset it; train.batch_size is the whole batch of an update",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (frozenset({"no"}), "unset it and set train.compile"),
    "ACCELERATE_FP8_BACKEND": (frozenset({"no"}), "unset it and set train.precision"),
    "ACCELERATE_TORCH_DEVICE": (frozenset(), "unset it; CUDA_VISIBLE_DEVICES chooses GPUs"),
    "ACCELERATE_USE_MEGATRON_LM": (_OFF, "unset it; Megatron-LM is no engine here"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, "unset it; networks are not split here"),
    "ACCELERATE_USE_SAGEMAKER": (_OFF, "unset it; start with torchrun"),
    "ACCELERATE_USE_DEEPSPEED": _ENGINE,
    "ACCELERATE_USE_FSDP": _ENGINE,
    "ACCELERATE_USE_CPU": _FLAG,
    "ACCELERATE_DEBUG_MODE": _FLAG,
    "ACCELERATE_CPU_AFFINITY": _FLAG,
}


def check_environment() -> None:
    """Raise UserError naming a variable of Accelerate's that would change training unseen."""
    for name, (allowed, remedy) in _VARIABLES.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in allowed:
            raise UserError(f"{name}: {value!r} in the environment is not for dist-adv; {remedy}")


def start_engine(cpu: bool, precision: str) -> Accelerator | None:
    """Return the Accelerator of the engine that the launcher has chosen; None for DDP.

    Raises UserError where it is not at hand, or set to what would train another network.
    """
    engines: dict[str, tuple[str, Callable[[bool, str], Accelerator]]] = {
        "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", start_deepspeed),
        "ACCELERATE_USE_FSDP": ("FSDP2", start_fsdp2),
    }
    for variable, (name, begin) in engines.items():
        if os.environ.get(variable, "false").lower() == "true":
            if "LOCAL_RANK" not in os.environ:
                raise UserError(
                    f"{variable} is set, but no launcher has started this process; {name} needs "
                    f"accelerate launch --config_file launch/accelerate/..."
                )
            if precision == "fp16":
                raise UserError(
                    f"train.precision: fp16 is not tried with {name}; use fp32, or bf16 where the "
                    f"GPU has it"
                )
            return begin(cpu, precision)
    return None


_IN_PARTS = ("ZeRO-3", "FSDP2")  # a rank has a part of each weight
_ZERO = ("ZeRO-1", "ZeRO-2", "ZeRO-3")
_OTHERS = (*_ZERO, "FSDP2")

# What an engine cannot do as DDP does it: where, whether a run wants it, what to do about it.
_REFUSALS: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (
        _OTHERS,
        lambda config: config.train.compile != "none",
        "train.compile: networks are compiled under DDP only; use none",
    ),
    (
        _OTHERS,
        lambda config: config.awp is not None,
        "awp: weights are perturbed under DDP only; use null",
    ),
    (
        _OTHERS,
        lambda config: "double backward" in find_method(config.method.name).needs,
        "method.name: differentiates a gradient, which works under DDP only; use another",
    ),
    (
        _ZERO,
        lambda config: config.train.accumulate > 1,
        "train.accumulate: DeepSpeed sends gradients with every backward pass; use 1",
    ),
    (
        _ZERO,
        lambda config: "kept graph" in find_method(config.method.name).needs,
        "method.name: differentiates a forward twice, which DeepSpeed cannot; use another",
    ),
    (
        _IN_PARTS,
        lambda config: config.average is not None,
        "average: needs whole weights on every rank, as ZeRO-1, ZeRO-2 and DDP have them; use null",
    ),
)


def check_engine(accelerator: Accelerator, config: Config) -> None:
    """Raise UserError for what this process's engine cannot do."""
    kind = accelerator.distributed_type
    launcher, engine = "FSDP", "FSDP2"
    if kind == DistributedType.DEEPSPEED:
        launcher, engine = "DeepSpeed", f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    elif kind != DistributedType.FSDP:
        return
    for engines, wanted, reason in _REFUSALS:
        if engine in engines and wanted(config):
            raise UserError(f"{reason}, or launch without {launcher} ({engine} here)")


_NETS = {DistributedType.DEEPSPEED: ZeroNet, DistributedType.FSDP: ShardedNet}


def prepare(accelerator: Accelerator, model: nn.Module, config: Config) -> TrainNet:
    """Return the network, ready to be trained under this process's engine.

    Raises UserError for what the engine cannot do.
    """
    check_engine(accelerator, config)
    net = _NETS.get(accelerator.distributed_type, TrainNet)
    return net(accelerator, model.train(), config.optim)
