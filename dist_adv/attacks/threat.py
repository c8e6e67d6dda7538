"""What the adversary may do: L-inf and L2 balls in pixel units of [0, 1].

Three pure tensor functions each, which are all that an attack needs to know of the geometry.
Shapes: x, delta and gradients are (n, C, H, W); keys are (n,) from `rng.sample_keys`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from dist_adv import rng

Projection = Callable[[Tensor], Tensor]
"""Moves a perturbation of known images into their ball, as `Threat.project` does."""


class Threat(Protocol):
    """A ball of radius `eps` around an image, cut with the valid pixels.

    share: of the full radius; below 1 while it is warmed up (`threat.warmup`).
    """

    @property
    def norm(self) -> str: ...
    @property
    def eps(self) -> float: ...
    @property
    def share(self) -> float: ...

    def at(self, share: float) -> Self:
        """Return a part of this full ball, with this share of its radius."""

    def random(self, keys: Tensor, shape: torch.Size) -> Tensor:
        """Return a perturbation of `shape`, uniform in the ball; one key a sample."""

    def ascend(self, delta: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """One step of steepest ascent of length `step_size` in this norm.

        A gradient that overflowed in half precision counts as 0 (NaN) or as very large (inf).
        """

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        """Return the perturbation moved into the ball, then so that x + delta is in [0, 1]."""

    def around(self, x: Tensor) -> Projection:
        """Return `project` for these images: what depends on them alone is computed once."""

    def size(self, delta: Tensor) -> Tensor:
        """Return its norm a sample, (n, 1, 1, 1)."""


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return values (n,) as (n, 1, 1, 1), to be multiplied with images."""
    return values.view(-1, *[1] * (like.dim() - 1))


def to_pixels(delta: Tensor, x: Tensor) -> Tensor:
    """Return the perturbation moved so that x + delta is in [0, 1]; both (n, C, H, W).

    Shrinks components only (x itself is valid), so a delta in the ball stays in the ball.
    """
    lower, upper = _room(x)
    return torch.clamp(delta, min=lower, max=upper)


def _room(x: Tensor) -> Tensor:
    """Return -x and 1 - x, (2, *x.shape): how far each pixel may go down and up."""
    return _ends(x.dtype, x.device).view(2, *[1] * x.dim()) - x


@lru_cache(maxsize=4)
def _ends(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([-0.0, 1.0], dtype=dtype, device=device)  # -0 - x is -x, of 0 too


@dataclass(frozen=True)
class Linf:
    """`max |delta_i| <= eps`; the steepest step is eps * sign(gradient) (Goodfellow 2015)."""

    eps: float
    share: float = 1.0
    norm: str = "linf"

    def at(self, share: float) -> Self:
        return replace(self, eps=share * self.eps, share=share)

    def random(self, keys: Tensor, shape: torch.Size) -> Tensor:
        return rng.uniform(keys, tuple(shape[1:]), 2 * self.eps).sub_(self.eps)

    def ascend(self, delta: Tensor, grad: Tensor, step_size: float) -> Tensor:
        # torch's sign of NaN is 0. Times 1, -1 and 0 the step is exact, however it is added.
        return torch.add(delta, grad.sign(), alpha=step_size)

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        return self.around(x)(delta)

    def around(self, x: Tensor) -> Projection:
        lower, upper = _room(x).clamp_(-self.eps, self.eps)
        return partial(torch.clamp, min=lower, max=upper)

    def size(self, delta: Tensor) -> Tensor:
        return per_sample(delta.flatten(1).abs().amax(1), delta)


@dataclass(frozen=True)
class L2:
    """`sqrt(sum delta_i^2) <= eps`; the steepest step is along the normalised gradient."""

    eps: float
    share: float = 1.0
    norm: str = "l2"

    def at(self, share: float) -> Self:
        return replace(self, eps=share * self.eps, share=share)

    def random(self, keys: Tensor, shape: torch.Size) -> Tensor:
        # A uniform point of a d-ball: a uniform direction times radius * u^(1/d).
        direction = rng.normal(keys, tuple(shape[1:]))
        u = rng.uniform(rng.substream(keys, "radius"), (1,) * (len(shape) - 1))
        radius = self.eps * u ** (1 / math.prod(shape[1:]))
        return direction * (radius / _norm(direction))

    def ascend(self, delta: Tensor, grad: Tensor, step_size: float) -> Tensor:
        grad = torch.nan_to_num(grad)
        # Brought to a largest component of 1 first: the squares of a nearly saturated loss's
        # gradient underflow, those of one that overflowed are infinite.
        largest = per_sample(grad.flatten(1).abs().amax(1), grad)
        grad = grad / largest.clamp_min(torch.finfo(grad.dtype).tiny)
        return delta + step_size * grad / _norm(grad)

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        return self.around(x)(delta)

    def around(self, x: Tensor) -> Projection:
        lower, upper = _room(x)

        def project(delta: Tensor) -> Tensor:
            shorter = delta * (self.eps / _norm(delta)).clamp(max=1)
            return torch.clamp(shorter, min=lower, max=upper)

        return project

    def size(self, delta: Tensor) -> Tensor:
        return per_sample(delta.flatten(1).norm(dim=1), delta)


def _norm(v: Tensor) -> Tensor:
    """L2 norm a sample, (n, 1, 1, 1), never 0 so that it can divide."""
    return per_sample(v.flatten(1).norm(dim=1).clamp_min(1e-12), v)


def build(norm: Literal["linf", "l2"], eps: float) -> Threat:
    """Return the threat of a configuration."""
    return Linf(eps) if norm == "linf" else L2(eps)
