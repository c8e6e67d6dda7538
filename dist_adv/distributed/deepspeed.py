"""DeepSpeed's ZeRO: parts of the optimiser, gradients and weights on each rank."""

import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor, nn

from dist_adv.config import OptimOptions
from dist_adv.distributed.accelerator import EngineAccelerator, autocast
from dist_adv.distributed.ddp import TrainNet
from dist_adv.distributed.optimizers import start_state
from dist_adv.errors import UserError


class _Plugin(DeepSpeedPlugin):
    """Accelerate's, without what tells transformers of it, which need not be installed."""

    def set_deepspeed_weakref(self) -> None:
        pass


def start_deepspeed(cpu: bool, precision: str) -> Accelerator:
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
    check_deepspeed(plugin.deepspeed_config)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # or it asks for a DataLoader
    plugin.deepspeed_config["train_batch_size"] = "auto"  # train.batch_size is
    if not cpu:
        return EngineAccelerator(precision, deepspeed_plugin=plugin)
    # A collective of its own for CPUs, of which a C++ compiler would have to make a library first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gloo = InitProcessGroupKwargs(backend="gloo")
    return EngineAccelerator(precision, deepspeed_plugin=plugin, kwargs_handlers=[gloo])


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raise UserError for what would make another experiment of this one."""
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
            "gradient_clipping: is the experiment's optim.clip; use 0",
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
        (
            config.get("communication_data_type") not in (None, "fp32", "auto"),
            "communication_data_type: would round the gradients that are sent; use fp32",
        ),
        ("compression_training" in config, "compression_training: trains another network"),
    )
    for applies, reason in refusals:
        if applies:
            raise UserError(f"DeepSpeed's configuration: {reason}")


class ZeroNet(TrainNet):
    """Under DeepSpeed. The optimiser's step is inside `accelerator.backward`.

    A step whose gradients are not finite is left out by DeepSpeed, which asks the device each time.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, options: OptimOptions) -> None:
        plugin = accelerator.state.deepspeed_plugin
        # Where nothing is said, Accelerate clips at 1.
        plugin.deepspeed_config["gradient_clipping"] = options.clip or 0.0
        super().__init__(accelerator, autocast(accelerator, model), options)
        self.skippable = None
        self.parameters = dict(model.named_parameters())
        self.shared_out = plugin.zero_stage == 3
        zero = self.prepared.optimizer
        if self.shared_out:
            start_state(self.plain, zero.fp32_partitioned_groups_flat)
        else:
            start_state(self.plain, zero.single_partition_of_fp32_groups)
            self._link_state()

    def backward(self, loss: Tensor, weight: Tensor) -> None:
        self.accelerator.backward(loss * weight)

    def flag_nonfinite(self, flag: Tensor) -> None:
        flag.copy_(~self.gradient_norm().isfinite())

    def gradient_norm(self) -> Tensor:
        norm = self.prepared.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.accelerator.device)

    def clip_gradients(self, limit: float) -> None:
        """Do nothing: DeepSpeed has clipped before its step."""

    def state_dict(self) -> dict[str, Tensor]:
        with self._gathered():
            return {name: tensor.clone() for name, tensor in self.bare.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with self._gathered(modifier_rank=0):
            self.bare.load_state_dict(state)
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                continue  # DeepSpeed keeps nothing of it besides
            if self.shared_out:
                safe_set_local_fp32_param(parameter, self._part(parameter, state[name]))
            else:
                safe_set_full_fp32_param(parameter, state[name])

    def _whole_state(self, key: str) -> list[Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        return [
            safe_get_full_optimizer_state(each, key)
            if each.requires_grad
            else torch.zeros(getattr(each, "ds_shape", each.shape), device=each.device)
            for each in self.parameters.values()
        ]

    def _load_whole_state(self, key: str, whole: Sequence[Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for parameter, each in zip(self.parameters.values(), whole, strict=True):
            if not parameter.requires_grad:
                continue
            if self.shared_out:
                safe_set_local_optimizer_state(parameter, self._part(parameter, each), key)
            else:
                safe_set_full_optimizer_state(parameter, each, key)

    def _link_state(self) -> None:
        """DeepSpeed does it in its first step, which is too late for `_load_whole_state`."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.prepared.optimizer
        for group, flat in zip(
            zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
        ):
            lazy_init_hp_params_optimizer_state(group, flat, self.plain.state)

    def _part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor. Parts are of one size, the last padded with zeros.

        DeepSpeed's own `safe_set_full_...` forget that (0.19).
        """
        from deepspeed.utils import safe_get_local_fp32_param

        size, rank = len(safe_get_local_fp32_param(parameter)), self.accelerator.process_index
        part = whole.flatten()[size * rank : size * (rank + 1)]
        return nn.functional.pad(part, (0, size - len(part)))

    def _gathered(self, **arguments: Any) -> AbstractContextManager[None]:
        """Gather whole weights meanwhile, which only stage 3 has in parts."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.parameters.values()), **arguments)
