"""FSDP2: a part of each parameter on each rank."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_adv.config import OptimOptions
from dist_adv.distributed.accelerator import EngineAccelerator, autocast
from dist_adv.distributed.ddp import TrainNet
from dist_adv.distributed.optimizers import start_state
from dist_adv.errors import UserError


def start_fsdp2(cpu: bool, precision: str) -> Accelerator:
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, OSError) as error:
        raise UserError(f"FSDP's configuration: {error}") from None
    if plugin.ignored_modules is not None:
        raise UserError("FSDP's configuration: fsdp_ignored_modules: leave it out; all are sharded")
    if plugin.fsdp_version != 2:
        raise UserError("FSDP's configuration: fsdp_version: 1 is not supported; use 2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.activation_checkpointing:
        raise UserError(
            "FSDP's configuration: fsdp_offload_params and fsdp_activation_checkpointing are not "
            "tried here; use false"
        )
    accelerator = EngineAccelerator(precision, cpu=cpu, fsdp_plugin=plugin)
    if cpu:
        # Accelerate ignores the plugin without a GPU; what it does with it works over gloo, too.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


class ShardedNet(TrainNet):
    """Under FSDP2: every rank keeps a part of each parameter, gathers it to compute, and forgets.

    torch has no fused SGD of such parts (2.14). Locally they are plain tensors, which it updates.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, options: OptimOptions) -> None:
        super().__init__(accelerator, autocast(accelerator, model), options)
        self.parameters: list[Any] = list(model.parameters())  # DTensors
        self.parts = [parameter.detach().to_local() for parameter in self.parameters]
        part_of = dict(zip(self.parameters, self.parts, strict=True))
        for group in self.plain.param_groups:
            group["params"] = [part_of[parameter] for parameter in group["params"]]
        start_state(self.plain, self.parts)
        self.plain.register_step_pre_hook(self._hand_over_gradients)

    def _hand_over_gradients(self, *_: Any) -> None:
        for parameter, own in zip(self.parameters, self.parts, strict=True):
            own.grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None

    def flag_nonfinite(self, flag: Tensor) -> None:
        flag.copy_(~self.gradient_norm().isfinite())

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

    def clip_gradients(self, limit: float) -> None:
        shorter = (limit / (self.gradient_norm() + 1e-6)).clamp(max=1)
        for parameter in self.parameters:
            if parameter.grad is not None:  # somebody's network may have weights that stay
                parameter.grad.to_local().mul_(shorter)

    def _whole_state(self, key: str) -> list[Tensor]:
        return [
            DTensor.from_local(
                self.plain.state[own][key],
                like.device_mesh,
                like.placements,
                shape=like.shape,
                stride=like.stride(),
            ).full_tensor()
            for own, like in zip(self.parts, self.parameters, strict=True)
        ]

    def _load_whole_state(self, key: str, whole: Sequence[Tensor]) -> None:
        for own, each, like in zip(self.parts, whole, self.parameters, strict=True):
            self.plain.state[own][key].copy_(_share(each, like).to_local())


def _share(whole: Tensor, like: DTensor) -> DTensor:
    """`whole`, which every rank has, as its parts."""
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
