"""What trains a network: DDP, DeepSpeed's ZeRO, FSDP2. Elsewhere nobody knows which.

The launcher chooses (`launch/accelerate/`) and tells every process by a variable of Accelerate's.
Each engine is a `TrainNet`: the network as methods see it, its optimiser, and the weights and
momentum in whole, so that a checkpoint of one engine goes on under another.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
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
    import deepspeed

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
    offload = [(zero.get(f"offload_{what}") or {}).get("device") for what in ("optimizer", "param")]
    refused = {
        "zero_stage: 0 is DDP; launch without DeepSpeed": zero.get("stage") not in (1, 2, 3),
        "offload_*_device: Accelerate would put Adam in the place of SGD; use none": any(
            device not in (None, "none") for device in offload
        ),
        "gradient_clipping: no other engine clips; use 0": config.get("gradient_clipping", 0)
        not in (0, "auto"),
        "gradient_accumulation_steps: train.batch_size is the whole batch; use 1": config.get(
            "gradient_accumulation_steps", 1
        )
        not in (1, "auto"),
        "fp16, bf16: DeepSpeed would round the weights; use train.precision": any(
            config.get(kind, {}).get("enabled") not in (None, False, "auto")
            for kind in ("fp16", "bf16", "torch_autocast")
        ),
        "optimizer, scheduler: are set in the experiment's 'optim'": bool(
            {"optimizer", "scheduler"} & config.keys()
        ),
    }
    for reason, applies in refused.items():
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
        states = [self.sgd.state[p] for group in self.sgd.param_groups for p in group["params"]]
        return [state["momentum_buffer"] for state in states if state]


class ZeroNet(TrainNet):
    """Under DeepSpeed. The optimiser's step is inside `accelerator.backward`.

    A step whose gradients are not finite is left out by DeepSpeed, which asks the device each time.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, options: OptimOptions) -> None:
        super().__init__(accelerator, _autocast(accelerator, model), options)
        self.guarded = None
        self.parameters = dict(model.named_parameters())
        # The ranks' flat shares have taken the parameters' places.
        _start_momentum(self.sgd)
        if options.momentum and accelerator.state.deepspeed_plugin.zero_stage < 3:
            from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

            link(self.parameters.values(), self.sgd.param_groups[0]["params"][0], self.sgd.state)

    def gradient_norm(self) -> Tensor:
        norm = self.prepared.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.accelerator.device)

    def state_dict(self) -> dict[str, Tensor]:
        with self._gathered():
            return {name: tensor.clone() for name, tensor in self.bare.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        with self._gathered(modifier_rank=0):
            self.bare.load_state_dict(state)
        for name, parameter in self.parameters.items():
            whole = state[name].to(self.accelerator.device)
            safe_set_full_fp32_param(parameter, whole)

    def momentum(self) -> list[Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self._own_momentum():
            return []
        return [
            safe_get_full_optimizer_state(parameter, "momentum_buffer")
            for parameter in self.parameters.values()
        ]

    def load_momentum(self, momentum: Sequence[Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for parameter, whole in zip(self.parameters.values(), momentum, strict=True):
            whole = whole.to(self.accelerator.device)
            safe_set_full_optimizer_state(parameter, whole, "momentum_buffer")

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
        _start_momentum(self.sgd)
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
    _start_momentum(sgd)
    return sgd


def _start_momentum(sgd: torch.optim.SGD) -> None:
    sgd.state.clear()
    for group in sgd.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
