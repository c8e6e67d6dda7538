"""What the attacks of an ensemble share: what they found, and images that drop out once found."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from torch import Tensor, nn


@dataclass
class Found:
    """What a search has found of n images.

    images: (n, C, H, W) in [0, 1], what fools the model, else the image itself. fooled: bool (n,).
    attacked, zero_gradients: of how many images a gradient was taken where the search began, and
    of how many it was exactly 0.
    """

    images: Tensor
    fooled: Tensor
    attacked: int = 0
    zero_gradients: int = 0

    @classmethod
    def nothing(cls, x: Tensor) -> Self:
        return cls(x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        images = torch.cat([each.images for each in parts])
        fooled = torch.cat([each.fooled for each in parts])
        attacked = sum(each.attacked for each in parts)
        return cls(images, fooled, attacked, sum(each.zero_gradients for each in parts))

    def take(self, numbers: Tensor, images: Tensor) -> None:
        """Note what fools the model: images (m, C, H, W) of the samples `numbers` (m,)."""
        self.images[numbers] = images
        self.fooled[numbers] = True


class Search(Protocol):
    """Looks within the ball around images that are right, until each has fooled the model."""

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, targets: Tensor, keys: Tensor
    ) -> Found:
        """Attack x (n, C, H, W) in [0, 1] with labels y (n,) on a frozen model in eval mode.

        targets: int64 (n,), the classes to be driven at, where the search has targets.
        keys: int64 (n,), of its random numbers.
        """


class Rows:
    """A dataclass of tensors with a row an image."""

    def only(self, which: Tensor) -> Self:
        """Return the rows `which`, a mask or numbers."""
        return type(self)(*(getattr(self, each.name)[which] for each in fields(self)))  # type: ignore[arg-type]
