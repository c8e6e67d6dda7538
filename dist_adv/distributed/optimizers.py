"""Fused optimisers: one kernel for all parameters, which can be told on the device to wait.

What they keep for a parameter starts at zero instead of at the first gradient: the same numbers,
also where the first update is not taken.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_adv.config import OptimOptions
from dist_adv.errors import UserError

_KEPT = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}
"""What is as large as the parameter, and saved."""


def fused_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """Return SGD or AdamW of a model's parameters, in groups with and without decay.

    Raises UserError for a network whose layers are not known, where their rates differ.
    """
    parameters = list(model.parameters())
    groups = (
        _by_layer(model, options) if options.layer_decay < 1 else _by_decay(parameters, options)
    )
    lr, decay = options.lr, options.weight_decay
    optimizer: torch.optim.Optimizer
    if options.name == "adamw":
        betas = options.momentum, options.beta2
        optimizer = torch.optim.AdamW(groups, lr, betas, weight_decay=decay, fused=True)
    else:
        momentum, nesterov = options.momentum, options.nesterov
        optimizer = torch.optim.SGD(
            groups, lr, momentum, weight_decay=decay, nesterov=nesterov, fused=True
        )
    start_state(optimizer, parameters)
    return optimizer


def _by_decay(parameters: Sequence[Tensor], options: OptimOptions) -> list[dict[str, Any]]:
    spared = [] if options.decay_norms else [each for each in parameters if each.dim() < 2]
    groups = [{"params": [each for each in parameters if options.decay_norms or each.dim() > 1]}]
    return groups + ([{"params": spared, "weight_decay": 0.0}] if spared else [])


def _by_layer(model: nn.Module, options: OptimOptions) -> list[dict[str, Any]]:
    """Return a group and more for each layer as timm counts them, with its share of the rate.

    Raises UserError for a network that is none of timm's.
    """
    net: Any = getattr(model, "net", None)
    if not hasattr(net, "group_matcher"):
        raise UserError(
            "optim.layer_decay: only networks of timm say what their layers are; use 1, or "
            "model.name=timm"
        )
    from timm.optim import param_groups_layer_decay

    return param_groups_layer_decay(
        net,
        options.weight_decay,
        layer_decay=options.layer_decay,
        weight_decay_exclude_1d=not options.decay_norms,
    )


def kept(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of the tensors that it keeps for each parameter; none without momentum."""
    if isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]:
        return ()
    return _KEPT[type(optimizer)]


def start_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Put zeros where the first step would put what it keeps of each of its own parameters."""
    optimizer.state.clear()
    for parameter in parameters if kept(optimizer) else ():
        state = optimizer.state[parameter]
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state |= {key: torch.zeros_like(parameter) for key in kept(optimizer)}


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Set the learning rate, of which a layer may have a share, and momentum or the first beta."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
