"""The interface between a training method and the engine.

A method yields losses; the engine takes one optimiser step for each. After a `yield` the weights
have moved and the gradients of whatever leaf tensors went into the loss are there, which is all
that Free needs. A method knows nothing of Accelerate, files or logging.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from dist_adv.data import Batch


class Net(Protocol):
    """The model as a method sees it."""

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of a training forward, whose backward gives the weights their gradients."""

    def frozen(self) -> AbstractContextManager[nn.Module]:
        """Return the bare module for input gradients: no weight gradients, no communication."""


@dataclass(frozen=True)
class Step:
    """One optimiser step: the mean loss over this rank's samples, and the logits (n, classes)."""

    loss: Tensor
    logits: Tensor


class Method(Protocol):
    """How to train on a batch."""

    @property
    def steps_per_batch(self) -> int:
        """How many losses `steps` yields."""

    def steps(self, net: Net, batch: Batch) -> Iterator[Step]:
        """Yield a loss for every optimiser step that this batch is worth."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what this rank carries on; the first axis is the position in the batch."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""


class Stateless:
    """The part of `Method` that is the same for methods that keep nothing between batches."""

    steps_per_batch = 1

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert not state


class CarriedDelta:
    """A perturbation that lives from batch to batch, one row a position of the global batch.

    Zero at the very start, indexed [:n] in a short batch, never reset. It is this rank's own.
    """

    def __init__(self) -> None:
        self._delta: Tensor | None = None

    def read(self, like: Tensor) -> Tensor:
        """Return the rows for a batch of the shape of `like` (n, C, H, W)."""
        if self._delta is None:
            self._delta = like.new_zeros(like.shape)
        return self._delta[: len(like)]

    def write(self, delta: Tensor) -> None:
        assert self._delta is not None
        self._delta[: len(delta)] = delta.detach()

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._delta is None else {"delta": self._delta}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._delta = state.get("delta")
