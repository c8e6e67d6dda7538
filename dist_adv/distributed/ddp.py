"""DDP, or a single process: the network as methods see it, and its fused optimiser."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_adv.attacks import frozen
from dist_adv.config import OptimOptions


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients together; not finite where one of them is not."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


class TrainNet:
    """The network in training, as methods see it (`methods.Net`), and its optimiser.

    Under DDP, or alone. The model is changed in place and `bare` all the same.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, options: OptimOptions) -> None:
        self.accelerator, self.bare = accelerator, model
        self.sgd = fused_sgd(model, options)
        self.prepared, self.optimizer = accelerator.prepare(model, self.sgd)
        # The optimiser that can be told on the device to skip an update; None where the engine
        # skips by itself.
        self.skippable: torch.optim.Optimizer | None = self.sgd

    def __call__(self, x: Tensor) -> Tensor:
        return self.prepared(x)

    def frozen(self) -> AbstractContextManager[nn.Module]:
        return frozen(self.bare)

    def gradient_norm(self) -> Tensor:
        """Return the norm of this update's gradients, the same on every rank."""
        return gradient_norm(self.bare)

    def state_dict(self) -> dict[str, Tensor]:
        """Return whole weights, and this rank's buffers. Every rank calls this."""
        return self.bare.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave. Every rank calls this.

        Raises RuntimeError for the state of another network.
        """
        self.bare.load_state_dict(state)

    def momentum(self) -> list[Tensor]:
        """Return a whole tensor a parameter; none without momentum. Every rank calls this."""
        return self._own_momentum()

    def load_momentum(self, momentum: Sequence[Tensor]) -> None:
        """Take what `momentum` gave. Every rank calls this."""
        for own, whole in zip(self._own_momentum(), momentum, strict=True):
            own.copy_(whole)

    def _own_momentum(self) -> list[Tensor]:
        """Return this rank's part of each."""
        return [state["momentum_buffer"] for state in self.sgd.state.values() if state]


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
    start_momentum(sgd, model.parameters())
    return sgd


def start_momentum(sgd: torch.optim.SGD, parameters: Iterable[Tensor]) -> None:
    sgd.state.clear()
    if sgd.defaults["momentum"]:
        for parameter in parameters:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
