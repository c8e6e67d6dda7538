"""Fast adaptive boundary attack, targeted (Croce and Hein 2020b): the nearest wrong point."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_adv.attacks.pgd import correct
from dist_adv.attacks.search import Found, Rows
from dist_adv.attacks.threat import Threat, per_sample

_OVERSHOOT = 1.05
"""eta: how far beyond the hyperplane a step goes."""
_BACK = 0.9
"""beta: what is left of a perturbation that fools, before the search goes on for a smaller one."""
_TO_THE_IMAGE = 0.1
"""alpha_max: the largest weight of the step from the image itself."""


@dataclass
class _Walk(Rows):
    """The images for which nothing within the ball is found yet. number: their places."""

    number: Tensor
    x: Tensor
    y: Tensor
    targets: Tensor
    at: Tensor


@dataclass(frozen=True)
class FAB:
    """Walks along the boundary between a class and a target, ever nearer to the image.

    It looks for the smallest perturbation; an image drops out once one is within the ball.
    """

    threat: Threat
    steps: int = 100

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, targets: Tensor, keys: Tensor
    ) -> Found:
        """As of `Search`. It draws nothing: its first run starts at the image."""
        found = Found.nothing(x)
        now = _Walk(torch.arange(len(x), device=x.device), x, y, targets, x)
        for _ in range(self.steps):
            now.at = self._step(now, *_towards(model, now))
            with torch.no_grad():
                fooled = ~correct(model(now.at), now.y)
            within = fooled & (self.threat.size(now.at - now.x).flatten() <= self.threat.eps)
            if within.any():
                found.take(now.number[within], now.at[within])
                now, fooled = now.only(~within), fooled[~within]
                if len(now.number) == 0:
                    break
            nearer = now.x + _BACK * (now.at - now.x)
            now.at = torch.where(per_sample(fooled, x), nearer, now.at)
        return found

    def _step(self, now: _Walk, difference: Tensor, gradient: Tensor) -> Tensor:
        """Return images beyond where the classes would be level, were the model linear here.

        difference: logit of the target minus that of the class, (n,), gradient: its own, at `at`.
        """
        # The hyperplane is <gradient, z> = <gradient, at> - difference.
        there = self._to_plane(now.at, gradient, -difference)
        moved = ((now.at - now.x) * gradient).flatten(1).sum(1)
        from_image = self._to_plane(now.x, gradient, moved - difference)
        near, far = (self.threat.size(each).clamp_min(1e-8) for each in (there, from_image))
        weight = (near / (near + far)).clamp_max(_TO_THE_IMAGE)
        walked = now.at + _OVERSHOOT * there
        returned = now.x + _OVERSHOOT * from_image
        return (walked * (1 - weight) + returned * weight).clamp(0, 1)

    def _to_plane(self, at: Tensor, gradient: Tensor, rise: Tensor) -> Tensor:
        """Return the smallest d with <gradient, d> = rise and at + d in [0, 1]; (n, C, H, W).

        d moves each pixel by lambda v_i, towards where it raises (or lowers) the product, as far
        as the pixel has room, with v = 1 for L-inf and |gradient| for L2. What that gains is a
        concave, piecewise linear function of lambda: Newton's steps from 0 never go too far, and
        end where no further pixel runs out of room. Where all room is too little, all is taken.
        """
        shape = at.shape
        gradient = gradient.flatten(1)
        up = (gradient * rise.sign()[:, None]).sign()
        at = at.flatten(1)
        room = torch.where(up > 0, 1 - at, at) * up.abs()
        speed = self.threat.ascend(torch.zeros_like(at), gradient, 1.0).abs()
        slope = gradient.abs()
        gains, limits = slope * speed, slope * room
        free = up != 0
        while True:
            left = rise.abs() - limits.masked_fill(free, 0).sum(1)
            rate = gains.masked_fill(~free, 0).sum(1)
            length = torch.where(rate > 0, left / rate, torch.inf).clamp_min(0)
            still = free & (length[:, None] * speed < room)
            if torch.equal(still, free):
                break
            free = still
        d = up * torch.where(free, length[:, None] * speed, room)
        return d.view(shape)


def _towards(model: nn.Module, walk: _Walk) -> tuple[Tensor, Tensor]:
    """Return the target's logit minus the class's, (n,), and its gradient, (n, C, H, W)."""
    at = walk.at.detach().requires_grad_()
    with torch.enable_grad():
        both = model(at).gather(1, torch.stack([walk.targets, walk.y], 1))
        difference = (both[:, 0] - both[:, 1]).to(at)
    return difference.detach(), torch.autograd.grad(difference.sum(), at)[0]
