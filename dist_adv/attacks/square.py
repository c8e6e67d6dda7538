"""Square attack (Andriushchenko et al. 2020): random squares, kept where the margin shrinks.

It takes no gradient, so a network that hides its gradients does not escape it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from dist_adv import rng
from dist_adv.attacks.pgd import correct, margin
from dist_adv.attacks.search import Found, Rows
from dist_adv.attacks.threat import Threat

_FIRST_SHARE = 0.8
"""The share of an image that the first squares cover."""
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which that share is halved."""
_BLOCK = 250
"""Queries whose random numbers are drawn at once: 5,000 times some small operators are slow."""


@dataclass
class _Best(Rows):
    """The images that still resist, with the best that is known of each. number: its place.

    margin: the largest other logit less the true one, at `images`. draws: this block's numbers.
    """

    number: Tensor
    x: Tensor
    y: Tensor
    keys: Tensor
    images: Tensor
    margin: Tensor
    draws: Tensor


@dataclass(frozen=True)
class Square:
    """Proposes a square a query, at a random place for each image of its own."""

    threat: Threat
    queries: int = 5000

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, targets: Tensor, keys: Tensor
    ) -> Found:
        """As of `Search`, without targets."""
        found = Found.nothing(x)
        linf = self.threat.norm == "linf"
        with torch.no_grad():
            images = self._stripes(x, keys) if linf else self._tiles(x, keys)
            number = torch.arange(len(x), device=x.device)
            now = _Best(number, x, y, keys, images, x.new_full((len(x),), -torch.inf), keys)
            now = self._ask(model, now, images, found)
            for query in range(self.queries):
                if len(now.number) == 0:
                    break
                if query % _BLOCK == 0:
                    now.draws = self._draws(now.keys, query, x.shape[1])
                drawn = now.draws[:, query % _BLOCK]
                size = self._size(query, x.shape[2:])
                proposed = self._repaint(now, size, drawn) if linf else self._move(now, size, drawn)
                now = self._ask(model, now, proposed, found)
        return found

    def _ask(self, model: nn.Module, now: _Best, proposed: Tensor, found: Found) -> _Best:
        """Keep what is proposed where the margin grows; return the images that still resist."""
        # Squares of one colour on one of the same change nothing, so there is nothing to ask.
        new = (proposed != now.images).flatten(1).any(1) | now.margin.isneginf()
        new = new.nonzero().squeeze(1)
        if len(new) == 0:
            return now
        proposed, y = proposed[new], now.y[new]
        logits = model(proposed)
        found_margin, right = margin(logits, y).to(now.margin), correct(logits, y)
        better = (found_margin > now.margin[new]) | ~right
        now.margin[new[better]] = found_margin[better]
        now.images[new[better]] = proposed[better]
        if right.all():
            return now
        found.take(now.number[new[~right]], proposed[~right])
        resist = torch.ones_like(now.number, dtype=torch.bool)
        resist[new[~right]] = False
        return now.only(resist)

    def _size(self, query: int, shape: torch.Size) -> int:
        """Return the side of a square, in pixels."""
        height, width = shape
        halved = sum(query > after for after in _HALVED_AFTER)
        side = round(math.sqrt(_FIRST_SHARE / 2**halved * height * width))
        if self.threat.norm == "linf":
            return min(max(side, 1), height, width)
        side = max(side, 3)
        return min(side + (side % 2 == 0), height, width)

    def _draws(self, keys: Tensor, query: int, channels: int) -> Tensor:
        """Return numbers of [0, 1) for a block of queries, (n, queries, 5 + channels).

        Two corners of squares, the orientation of a pattern, and signs.
        """
        return rng.uniform(rng.substream(keys, f"queries {query}"), (_BLOCK, 5 + channels))

    # --- L-inf: stripes, and squares of pixels at one end of their interval or the other ---------

    def _stripes(self, x: Tensor, keys: Tensor) -> Tensor:
        _, channels, _, width = x.shape
        signs = rng.uniform(rng.substream(keys, "stripes"), (channels, 1, width))
        return (x + self.threat.eps * _signs(signs).to(x)).clamp(0, 1)

    def _repaint(self, now: _Best, size: int, drawn: Tensor) -> Tensor:
        """Put each channel of a square at one end of its interval.

        The authors add 2 eps or -2 eps and project, which leads there from anywhere in the ball.
        """
        end = now.x + self.threat.eps * _signs(drawn[:, 5:, None, None]).to(now.x)
        return torch.where(_inside(now.x, size, drawn[:, :2]), end.clamp(0, 1), now.images)

    # --- L2: bumps, two of opposite signs side by side, whose weight moves from square to square -

    def _tiles(self, x: Tensor, keys: Tensor) -> Tensor:
        _, channels, height, _ = x.shape
        size = max(1, height // 5)
        tops, lefts = (range((height - 5 * size) // 2, end - size + 1, size) for end in x.shape[2:])
        places = [(top, left) for top in tops for left in lefts]
        drawn = rng.uniform(rng.substream(keys, "tiles"), (len(places), 1 + channels))
        delta = torch.zeros_like(x)
        for (top, left), each in zip(places, drawn.unbind(1), strict=True):
            tile = delta[:, :, top : top + size, left : left + size]
            tile += self._pattern(x, size, each[:, 0])[:, None] * _signs(each[:, 1:, None, None])
        return self._on_surface(x, delta)

    def _move(self, now: _Best, size: int, drawn: Tensor) -> Tensor:
        """Paint a pattern into one square, with the weight of another, which is emptied."""
        x, eps = now.x, self.threat.eps
        delta = now.images - x
        here, there = (_inside(x, size, drawn[:, at : at + 2]) for at in (0, 2))
        unused = (eps**2 - self.threat.size(delta) ** 2).clamp_min(0) / x.shape[1]
        weight = (unused + _energy(delta * (here | there))).sqrt()
        top, left = _corner(x, size, drawn[:, :2])
        pattern = _placed(self._pattern(x, size, drawn[:, 4]), x, top, left)
        old = delta * here / (1e-12 + _energy(delta * here).sqrt())
        new = (pattern[:, None] * _signs(drawn[:, 5:, None, None]) + old) * here
        new = new * (weight / (1e-12 + _energy(new).sqrt()))
        return self._on_surface(x, torch.where(here, new, delta * ~there))

    def _on_surface(self, x: Tensor, delta: Tensor) -> Tensor:
        return (x + delta * (self.threat.eps / (self.threat.size(delta) + 1e-12))).clamp(0, 1)

    def _pattern(self, x: Tensor, size: int, drawn: Tensor) -> Tensor:
        """Return a bump and its negative, one above the other or side by side; (n, size, size)."""
        upright = _upright(size, x.dtype, x.device)
        return torch.where(drawn[:, None, None] > 0.5, upright.T, upright)


def _signs(drawn: Tensor) -> Tensor:
    """-1 or 1 from numbers of [0, 1)."""
    return torch.where(drawn < 0.5, -1.0, 1.0)


def _corner(x: Tensor, size: int, drawn: Tensor) -> Iterator[Tensor]:
    """Yield the first row and column of each image's square, (n,) each, from numbers (n, 2).

    The last of all places is never taken, as in both codes of the authors.
    """
    for number, length in zip(drawn.unbind(1), x.shape[2:], strict=True):
        yield (number * (length - size)).long()


def _inside(x: Tensor, size: int, drawn: Tensor) -> Tensor:
    """bool (n, 1, H, W): the pixels of each image's square."""
    within = []
    for first, length in zip(_corner(x, size, drawn), x.shape[2:], strict=True):
        place = torch.arange(length, device=x.device) - first[:, None]
        within.append((place >= 0) & (place < size))
    rows, columns = within
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _placed(pattern: Tensor, x: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Return patterns (n, size, size) at their corners (n,) of images: (n, H, W), 0 elsewhere."""
    n, size, _ = pattern.shape
    canvas = pattern.new_zeros(n, *x.shape[2:])
    places = torch.arange(size, device=x.device)
    rows, columns = (first[:, None] + places for first in (top, left))
    images = torch.arange(n, device=x.device)[:, None, None]
    canvas[images, rows[:, :, None], columns[:, None, :]] = pattern
    return canvas


def _energy(delta: Tensor) -> Tensor:
    """Return the sum of squares of each channel, (n, C, 1, 1)."""
    return delta.square().sum((2, 3), keepdim=True)


@lru_cache(maxsize=16)
def _upright(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a bump above its negative, (size, size), of norm 1; one for hundreds of queries."""
    upright = torch.cat([_bump(size // 2, size), -_bump(size - size // 2, size)])
    return (upright / upright.norm()).to(device, dtype)


def _bump(height: int, width: int) -> Tensor:
    """Return a bump of norm 1: ring k around its middle is the sum of 1 / (j + 1)^2, j >= k."""
    rings = 1 + max(height // 2, width // 2)
    heights = (1 / torch.arange(1, rings + 1) ** 2).flip(0).cumsum(0).flip(0)
    row, column = ((torch.arange(length) - length // 2).abs() for length in (height, width))
    bump = heights[torch.maximum(row[:, None], column)]
    return bump / bump.norm()
