"""DDP, or a single process: the network as methods see it, and its fused optimiser."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_adv.attacks import frozen
from dist_adv.config import OptimOptions
from dist_adv.distributed.collectives import sum_over_ranks
from dist_adv.distributed.optimizers import fused_optimizer, kept


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients together; not finite where one of them is not."""
    return torch.nn.utils.get_total_norm(_gradients(model))


def flag_nonfinite(model: nn.Module, flag: Tensor) -> None:
    """Set `flag`, a float32 0, to 1 where a number in a gradient is not finite.

    As GradScaler finds it, in one kernel: it also divides by a scale, which is 1 here.
    """
    one = _one(flag.device)
    torch._amp_foreach_non_finite_check_and_unscale_(_gradients(model), flag, one)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


class TrainNet:
    """The network in training, as methods see it (`methods.Net`), and its optimiser.

    Under DDP, or alone. The model is changed in place and `bare` all the same.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, options: OptimOptions) -> None:
        self.accelerator, self.bare = accelerator, model
        self.plain = fused_optimizer(model, options)
        self.prepared, self.optimizer = accelerator.prepare(model, self.plain)
        self.average: nn.Module | None = None
        # The optimiser that can be told on the device to skip an update; None where the engine
        # skips by itself.
        self.skippable: torch.optim.Optimizer | None = self.plain

    def __call__(self, x: Tensor) -> Tensor:
        return self.prepared(x)

    def frozen(self, mode: Literal["train", "eval"] = "train") -> AbstractContextManager[nn.Module]:
        # In training it is as its own train() left it: somebody's may keep BatchNorm in eval mode.
        return frozen(self.bare, eval_mode=mode == "eval")

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return sum_over_ranks(self.accelerator, value.detach())

    def averaged(self, x: Tensor) -> Tensor:
        assert self.average is not None, "a method that needs it is refused without"
        with torch.no_grad(), self.accelerator.autocast():
            return self.average(x).to(x.dtype)

    def backward(self, loss: Tensor, weight: Tensor) -> None:
        """Add the gradients of weight * loss; both are of one number.

        As `accelerator.backward`, which divides the loss by 1 first. The weight is where the pass
        begins, so that nothing is multiplied.
        """
        scaler = self.accelerator.scaler
        (scaler.scale(loss) if scaler else loss).backward(weight)

    def flag_nonfinite(self, flag: Tensor) -> None:
        """Set `flag`, a 0, to 1 where this update's gradients are not finite, on every rank."""
        flag_nonfinite(self.bare, flag)

    def gradient_norm(self) -> Tensor:
        """Return the norm of this update's gradients, the same on every rank."""
        return gradient_norm(self.bare)

    def clip_gradients(self, limit: float) -> None:
        """Shorten this update's gradients together to a norm of `limit` where it is larger."""
        self.accelerator.unscale_gradients(self.optimizer)
        torch.nn.utils.clip_grads_with_norm_(self.bare.parameters(), limit, self.gradient_norm())

    def state_dict(self) -> dict[str, Tensor]:
        """Return whole weights, and this rank's buffers. Every rank calls this."""
        return self.bare.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave. Every rank calls this.

        Raises RuntimeError for the state of another network.
        """
        self.bare.load_state_dict(state)

    def optimizer_state(self) -> dict[str, list[Tensor]]:
        """Return by name what is kept of each parameter, whole. Every rank calls this.

        AdamW's count of steps is one number for all, `step`; weights that stay have taken none.
        """
        state = {key: self._whole_state(key) for key in kept(self.plain)}
        counts = self._counts()
        return state | ({"step": [torch.stack(counts).amax()]} if counts else {})

    def load_optimizer_state(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Take what `optimizer_state` gave. Every rank calls this."""
        for key in kept(self.plain):
            self._load_whole_state(key, state[key])
        for count in self._counts():
            count.copy_(state["step"][0])

    def _whole_state(self, key: str) -> list[Tensor]:
        return [self.plain.state[parameter][key] for parameter in self.bare.parameters()]

    def _load_whole_state(self, key: str, whole: Sequence[Tensor]) -> None:
        for own, each in zip(self._whole_state(key), whole, strict=True):
            own.copy_(each)

    def _counts(self) -> list[Tensor]:
        return [state["step"] for state in self.plain.state.values() if "step" in state]
