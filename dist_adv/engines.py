"""What trains a network: DDP, DeepSpeed's ZeRO, FSDP2. Elsewhere nobody knows which.

The launcher chooses (`launch/accelerate/`) and tells every process by a variable of Accelerate's.
Each engine is a `TrainNet`: the network as methods see it, its optimiser, and the weights and
momentum in whole, so that a checkpoint of one engine goes on under another.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    convert_outputs_to_fp32,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_adv.attacks import frozen
from dist_adv.config import OptimOptions, TrainOptions
from dist_adv.errors import UserError
from dist_adv.nonfinite import gradient_norm

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
    """Raises UserError naming a variable of Accelerate's that would change training unseen."""
    for name, (allowed, remedy) in _VARIABLES.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in allowed:
            raise UserError(f"{name}: {value!r} in the environment is not for dist-adv; {remedy}")


def start(cpu: bool, precision: str) -> Accelerator | None:
    """The Accelerator of the engine that the launcher has chosen; None for DDP.

    Raises UserError where it is not at hand, or set to what would train another network.
    """
    engines: dict[str, tuple[str, Callable[[bool, str], Accelerator]]] = {
        "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", _start_deepspeed),
        "ACCELERATE_USE_FSDP": ("FSDP2", _start_fsdp2),
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


class _Accelerator(Accelerator):
    """Accelerate's, whose own ways of mixed precision are off: each engine has another.

    Networks compute under autocast instead (`_autocast`), in fp32 weights, as under DDP.
    """

    def __init__(self, precision: str, **arguments: Any) -> None:
        self._computes_in = precision
        super().__init__(mixed_precision="no", **arguments)

    @property
    def mixed_precision(self) -> str:
        return self._computes_in.replace("fp32", "no")


class _Plugin(DeepSpeedPlugin):
    """Accelerate's, without what tells transformers of it, which need not be installed."""

    def set_deepspeed_weakref(self) -> None:
        pass


def _start_deepspeed(cpu: bool, precision: str) -> Accelerator:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed; pip install 'dist-adv[deepspeed]'")
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it has found no other
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")  # warns of an optimiser that is not its own
    # It has not heard of torch 2.14's new names yet.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    try:
        plugin = _Plugin(zero3_init_flag=False)
    except (ValueError, OSError) as error:
        raise UserError(f"DeepSpeed's configuration: {error}") from None
    _check_deepspeed(plugin.deepspeed_config)
    # Accelerate would clip gradients at 1 where nothing is said, and ask for a DataLoader.
    plugin.deepspeed_config |= {"gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 1}
    if not cpu:
        return _Accelerator(precision, deepspeed_plugin=plugin)
    # A collective of its own for CPUs, of which a C++ compiler would have to make a library first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gloo = InitProcessGroupKwargs(backend="gloo")
    return _Accelerator(precision, deepspeed_plugin=plugin, kwargs_handlers=[gloo])


def _check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raises UserError for what would make another experiment of this one."""
    zero = config["zero_optimization"]
    offloads = [zero.get(key) or {} for key in ("offload_optimizer", "offload_param")]
    formats = [config.get(key, {}) for key in ("fp16", "bf16", "torch_autocast")]
    refusals = (
        (zero.get("stage") not in (1, 2, 3), "zero_stage: 1, 2 or 3; 0 is DDP, without DeepSpeed"),
        (
            any(offload.get("device", "none") != "none" for offload in offloads),
            "offload_*_device: Accelerate would put Adam in the place of SGD; use none",
        ),
        (
            config.get("gradient_clipping", 0) not in (0, "auto"),
            "gradient_clipping: no other engine clips; use 0",
        ),
        (
            config.get("gradient_accumulation_steps", 1) not in (1, "auto"),
            "gradient_accumulation_steps: train.batch_size is the whole batch; use 1",
        ),
        (
            any(each.get("enabled", False) not in (False, "auto") for each in formats),
            "fp16, bf16: would round the weights; set train.precision in the experiment",
        ),
        (
            not config.keys().isdisjoint({"optimizer", "scheduler"}),
            "optimizer, scheduler: are the experiment's 'optim'",
        ),
    )
    for applies, reason in refusals:
        if applies:
            raise UserError(f"DeepSpeed's configuration: {reason}")


def _start_fsdp2(cpu: bool, precision: str) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError("FSDP's configuration: fsdp_version: 1 is not supported; use 2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.activation_checkpointing:
        raise UserError(
            "FSDP's configuration: fsdp_offload_params and fsdp_activation_checkpointing are not "
            "tried here; use false"
        )
    accelerator = _Accelerator(precision, cpu=cpu, fsdp_plugin=plugin)
    if cpu:
        # Accelerate ignores the plugin without a GPU; what it does with it works over gloo, too.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


class TrainNet:
    """The network in training, as methods see it (`methods.Net`), and its optimiser.

    Under DDP, or alone. The model is changed in place and `bare` all the same.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, options: OptimOptions) -> None:
        self.accelerator, self.bare = accelerator, model
        self.sgd = fused_sgd(model, options)
        self.prepared, self.optimizer = accelerator.prepare(model, self.sgd)
        # Whom to tell of updates that are not to be taken.
        self.guarded: torch.optim.Optimizer | None = self.sgd

    def __call__(self, x: Tensor) -> Tensor:
        return self.prepared(x)

    def frozen(self) -> AbstractContextManager[nn.Module]:
        return frozen(self.bare)

    def gradient_norm(self) -> Tensor:
        """Of all gradients of this update, the same on every rank; NaN or inf where they are."""
        return gradient_norm(self.bare)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole weights, and this rank's buffers. Every rank calls this."""
        return self.bare.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take such a state. Every rank calls this.

        Raises RuntimeError for the state of another network.
        """
        self.bare.load_state_dict(state)

    def momentum(self) -> list[Tensor]:
        """A whole tensor a parameter; none without momentum. Every rank calls this."""
        return self._own_momentum()

    def load_momentum(self, momentum: Sequence[Tensor]) -> None:
        """Take what `momentum` gave. Every rank calls this."""
        for own, whole in zip(self._own_momentum(), momentum, strict=True):
            own.copy_(whole)

    def _own_momentum(self) -> list[Tensor]:
        """This rank's part of each."""
        return [state["momentum_buffer"] for state in self.sgd.state.values() if state]


class ZeroNet(TrainNet):
    """Under DeepSpeed. The optimiser's step is inside `accelerator.backward`.

    A step whose gradients are not finite is left out by DeepSpeed, which asks the device each time.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, options: OptimOptions) -> None:
        super().__init__(accelerator, _autocast(accelerator, model), options)
        self.guarded = None
        self.parameters = dict(model.named_parameters())
        self.shared_out = accelerator.state.deepspeed_plugin.zero_stage == 3
        zero = self.prepared.optimizer
        if self.shared_out:
            _start_momentum(self.sgd, zero.fp32_partitioned_groups_flat)
        else:
            _start_momentum(self.sgd, zero.single_partition_of_fp32_groups)
            self._link_momentum()

    def gradient_norm(self) -> Tensor:
        norm = self.prepared.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.accelerator.device)

    def state_dict(self) -> dict[str, Tensor]:
        with self._gathered():
            return {name: tensor.clone() for name, tensor in self.bare.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with self._gathered(modifier_rank=0):
            self.bare.load_state_dict(state)
        for name, parameter in self.parameters.items():
            if self.shared_out:
                safe_set_local_fp32_param(parameter, self._part(parameter, state[name]))
            else:
                safe_set_full_fp32_param(parameter, state[name])

    def momentum(self) -> list[Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self._own_momentum():
            return []
        return [
            safe_get_full_optimizer_state(parameter, "momentum_buffer")
            for parameter in self.parameters.values()
        ]

    def load_momentum(self, momentum: Sequence[Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for parameter, whole in zip(self.parameters.values(), momentum, strict=False):
            if self.shared_out:
                part = self._part(parameter, whole)
                safe_set_local_optimizer_state(parameter, part, "momentum_buffer")
            else:
                safe_set_full_optimizer_state(parameter, whole, "momentum_buffer")

    def _link_momentum(self) -> None:
        """DeepSpeed does it in its first step, which is too late for `load_momentum`."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat in self.sgd.state:
            lazy_init_hp_params_optimizer_state(self.parameters.values(), flat, self.sgd.state)

    def _part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's of a tensor. Parts are of one size, the last is filled up with zeros.

        DeepSpeed's own `safe_set_full_...` forget that (0.19).
        """
        from deepspeed.utils import safe_get_local_fp32_param

        size, rank = len(safe_get_local_fp32_param(parameter)), self.accelerator.process_index
        part = whole.flatten()[size * rank : size * (rank + 1)]
        return nn.functional.pad(part, (0, size - len(part)))

    def _gathered(self, **arguments: Any) -> AbstractContextManager[None]:
        """With stage 3 the weights are whole inside; with the others they always are."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.parameters.values()), **arguments)


class ShardedNet(TrainNet):
    """Under FSDP2: every rank keeps a part of each parameter, gathers it to compute, and forgets.

    torch has no fused SGD of such parts (2.14). Locally they are plain tensors, which it updates.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, options: OptimOptions) -> None:
        super().__init__(accelerator, _autocast(accelerator, model), options)
        self.parameters: list[Any] = list(model.parameters())  # DTensors
        (group,) = self.sgd.param_groups
        group["params"] = [parameter.detach().to_local() for parameter in self.parameters]
        _start_momentum(self.sgd, group["params"])
        self.sgd.register_step_pre_hook(self._hand_over_gradients)

    def _hand_over_gradients(self, sgd: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, own in zip(self.parameters, sgd.param_groups[0]["params"], strict=True):
            own.grad, parameter.grad = parameter.grad.to_local(), None

    def gradient_norm(self) -> Tensor:
        norm: Any = super().gradient_norm()
        return norm.full_tensor()

    def state_dict(self) -> dict[str, Tensor]:
        state = self.bare.state_dict()
        return {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in state.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        now = self.bare.state_dict()
        self.bare.load_state_dict(
            {
                name: _share(tensor, now[name]) if isinstance(now.get(name), DTensor) else tensor
                for name, tensor in state.items()
            }
        )

    def momentum(self) -> list[Tensor]:
        return [
            DTensor.from_local(
                own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
            ).full_tensor()
            for own, like in zip(self._own_momentum(), self.parameters, strict=False)
        ]

    def load_momentum(self, momentum: Sequence[Tensor]) -> None:
        shares = [
            _share(whole, like).to_local()
            for whole, like in zip(momentum, self.parameters, strict=False)
        ]
        super().load_momentum(shares)


def _share(whole: Tensor, like: DTensor) -> DTensor:
    """`whole`, which every rank has, as its parts."""
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _autocast(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """What `accelerator.prepare` does to a model under DDP, which leaves its weights in fp32.

    Parts of parameters are parts of rows: channels cannot be last.
    """
    if accelerator.mixed_precision == "bf16":
        cast = torch.autocast(accelerator.device.type, torch.bfloat16)
        model.forward = convert_outputs_to_fp32(cast(model.forward))
    return model.to(memory_format=torch.contiguous_format)


_NETS = {DistributedType.DEEPSPEED: ZeroNet, DistributedType.FSDP: ShardedNet}


def prepare(
    accelerator: Accelerator, model: nn.Module, optim: OptimOptions, train: TrainOptions
) -> TrainNet:
    """The network, ready to be trained under this process's engine.

    Raises UserError for a choice that the engine does not allow.
    """
    net = _NETS.get(accelerator.distributed_type, TrainNet)
    if net is not TrainNet and train.compile != "none":
        raise UserError(
            "train.compile: compiled networks are trained under DDP only; use none, or launch "
            "without DeepSpeed and FSDP"
        )
    return net(accelerator, model.train(), optim)


def fused_sgd(model: nn.Module, options: OptimOptions) -> torch.optim.SGD:
    """One kernel for all parameters, which can be told on the device not to take a step.

    Momentum starts at zero instead of at the first gradient: the same numbers, also where the
    first update is not taken.
    """
    sgd = torch.optim.SGD(
        model.parameters(),
        options.lr,
        options.momentum,
        weight_decay=options.weight_decay,
        fused=True,
    )
    _start_momentum(sgd, model.parameters())
    return sgd


def _start_momentum(sgd: torch.optim.SGD, parameters: Iterable[Tensor]) -> None:
    sgd.state.clear()
    if sgd.defaults["momentum"]:
        for parameter in parameters:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
