"""Fused optimisers: one kernel for all parameters, which can be told on the device to wait.

What they keep for a parameter starts at zero instead of at the first gradient: the same numbers,
also where the first update is not taken.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dist_adv.config import OptimOptions

_KEPT = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}
"""What is as large as the parameter, and saved."""


def fused_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """Return SGD or AdamW of a model's parameters, in a group with and one without decay."""
    parameters = list(model.parameters())
    spared = [] if options.decay_norms else [each for each in parameters if each.dim() < 2]
    groups = [{"params": [each for each in parameters if options.decay_norms or each.dim() > 1]}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})  # type: ignore[dict-item]
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
    """Set the learning rate, and momentum or AdamW's first beta."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
