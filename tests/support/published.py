"""The published training loops, written plainly from the papers' pseudocode.

Nothing of dist_adv's attacks, methods, threats or schedules is used: these loops are what the
framework is compared with. They take the same batches and the same uniform noise.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def clamp(x: Tensor, low, high) -> Tensor:
    return torch.max(torch.min(x, torch.as_tensor(high)), torch.as_tensor(low))


class Recipe:
    """One run: SGD with the triangular learning rate over `total` updates.

    fused: torch's fused SGD rounds some elements otherwise than its plain one (1 ulp an update).
    """

    def __init__(
        self, model: nn.Module, eps: float, lr: float, total: int, fused: bool = False
    ) -> None:
        self.model, self.eps, self.lr, self.total = model.train(), eps, lr, total
        weights = model.parameters()
        self.sgd = torch.optim.SGD(weights, lr, momentum=0.9, weight_decay=5e-4, fused=fused)
        self.done = 0

    def update(self, loss: Tensor) -> None:
        t, half = self.done, self.total / 2
        rate = self.lr * (t / half if t <= half else (self.total - t) / half)
        self.sgd.param_groups[0]["lr"] = rate
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        self.done += 1

    def gradient(self, x: Tensor, delta: Tensor, y: Tensor) -> Tensor:
        """As the published code does it: a full backward, and delta's gradient out of it."""
        delta = delta.clone().requires_grad_()
        self.model.zero_grad()
        F.cross_entropy(self.model(x + delta), y).backward()
        return delta.grad


def natural(run: Recipe, batches: Iterable, noise: Callable) -> None:
    for x, y, _ in batches:
        run.update(F.cross_entropy(run.model(x), y))


def pgd(steps: int, alpha: float, random: bool) -> Callable:
    """Algorithm 1."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        for x, y, keys in batches:
            delta = torch.zeros_like(x)
            if random:
                delta = clamp(-run.eps + 2 * run.eps * noise(keys), -x, 1 - x)
            for _ in range(steps):
                delta = delta + alpha * run.gradient(x, delta, y).sign()
                delta = clamp(clamp(delta, -run.eps, run.eps), -x, 1 - x)
            run.update(F.cross_entropy(run.model(x + delta), y))

    return loop


def fast(alpha: float, init: str) -> Callable:
    """Algorithm 3 of Wong et al., with their `zero` and `previous` variants."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        kept = None
        for x, y, keys in batches:
            kept = torch.zeros_like(x) if kept is None else kept
            start = {
                "random": lambda x, keys: clamp(-run.eps + 2 * run.eps * noise(keys), -x, 1 - x),
                "zero": lambda x, keys: torch.zeros_like(x),
                "previous": lambda x, keys, kept=kept: kept[: len(x)],
            }[init]
            delta = start(x, keys)
            delta = clamp(delta + alpha * run.gradient(x, delta, y).sign(), -run.eps, run.eps)
            delta = clamp(delta, -x, 1 - x)
            if init == "previous":
                kept[: len(x)] = delta
            run.update(F.cross_entropy(run.model(x + delta), y))

    return loop


def free(replays: int) -> Callable:
    """Algorithm 2: one backward for both gradients, delta never reset."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        kept = None
        for x, y, _ in batches:
            kept = torch.zeros_like(x) if kept is None else kept
            for _ in range(replays):
                delta = kept[: len(x)].clone().requires_grad_()
                run.update(F.cross_entropy(run.model(x + delta), y))
                moved = clamp(delta.detach() + run.eps * delta.grad.sign(), -run.eps, run.eps)
                kept[: len(x)] = clamp(moved, -x, 1 - x)

    return loop
