"""What the framework is measured against: the published loops, written from their pseudocode.

As people run them: fp32, images in NCHW, plain SGD, every attack gradient out of a full backward
pass that computes the weights' gradients as well, images decoded and augmented one by one by two
worker processes. Nothing of the framework's attacks, methods or loader is used.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils import data
from torchvision import transforms


def clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    return torch.max(torch.min(x, torch.as_tensor(high).to(x)), torch.as_tensor(low).to(x))


class Published:
    """One model in training; each method takes a batch x (n, C, H, W) in [0, 1], y (n,)."""

    def __init__(self, model: nn.Module, eps: float, lr: float) -> None:
        self.model, self.eps = model.to(memory_format=torch.contiguous_format).train(), eps
        self.sgd = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        self.delta: Tensor | None = None

    def natural(self, x: Tensor, y: Tensor) -> None:
        self._update(x, y)

    def pgd(self, x: Tensor, y: Tensor, steps: int, alpha: float) -> None:
        """Algorithm 1 of Free against Fast (Madry et al. 2018)."""
        delta = self._random(x)
        for _ in range(steps):
            delta = self._ascended(x, y, delta, alpha)
        self._update(x + delta, y)

    def fast(self, x: Tensor, y: Tensor, alpha: float) -> None:
        """Algorithm 3 of Wong, Rice and Kolter (2020)."""
        delta = self._ascended(x, y, self._random(x), alpha)
        self._update(x + delta, y)

    def free(self, x: Tensor, y: Tensor, replays: int) -> None:
        """Algorithm 2 of Free against Fast (Shafahi et al. 2019)."""
        if self.delta is None:
            self.delta = torch.zeros_like(x)
        for _ in range(replays):
            delta = self.delta[: len(x)].clone().requires_grad_()
            self._update(x + delta, y)
            assert delta.grad is not None
            moved = clamp(delta.detach() + self.eps * delta.grad.sign(), -self.eps, self.eps)
            self.delta[: len(x)] = clamp(moved, -x, 1 - x)

    def _random(self, x: Tensor) -> Tensor:
        return clamp(torch.empty_like(x).uniform_(-self.eps, self.eps), -x, 1 - x)

    def _ascended(self, x: Tensor, y: Tensor, delta: Tensor, alpha: float) -> Tensor:
        delta = delta.detach().requires_grad_()
        F.cross_entropy(self.model(x + delta), y).backward()
        assert delta.grad is not None
        moved = clamp(delta.detach() + alpha * delta.grad.sign(), -self.eps, self.eps)
        return clamp(moved, -x, 1 - x)

    def _update(self, x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(self.model(x), y)
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()


class Images(data.Dataset):
    """As torchvision's CIFAR10: a PIL image of each sample, then the transforms."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[sample])), self.labels[sample]


def batches(pixels: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """torchvision's way: uint8 (N, C, H, W) through a DataLoader with two workers."""
    images = Images(pixels, labels)
    return iter(data.DataLoader(images, batch_size, shuffle=True, num_workers=2))
