"""The published training loops, written plainly from the papers' pseudocode.

Nothing of dist_adv's attacks, methods, threats or schedules is used: these loops are what the
framework is compared with. They take the same batches and the same random numbers.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_adv import rng


def clamp(x: Tensor, low, high) -> Tensor:
    return torch.max(torch.min(x, torch.as_tensor(high)), torch.as_tensor(low))


@dataclass
class Extras:
    """What a run may have besides its method. Times are in epochs."""

    smoothing: float = 0.0
    adamw: bool = False
    nesterov: bool = False
    decay_norms: bool = True
    clip: float | None = None
    cosine_after: float | None = None  # of linear warm-up, before a cosine
    eps_after: float | None = None  # in which eps grows
    awp: float | None = None
    awp_after: int = 0
    average: float | None = None  # horizon
    # Epoch by epoch: batch sizes, sizes of images, radii; and the rate's straight lines.
    batches: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    eps: tuple[float, ...] = ()
    rates: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # epochs, shares of lr


NO_EXTRAS = Extras()


class Recipe:
    """One run: SGD with the triangular learning rate over `total` updates, or as `extras` say.

    epoch: the updates of one.

    fused: torch's fused SGD rounds some elements otherwise than its plain one (1 ulp an update).
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        lr: float,
        total: int,
        fused: bool = False,
        extras: Extras = NO_EXTRAS,
        epoch: int = 0,
    ) -> None:
        self.model, self.full_eps, self.lr, self.total = model.train(), eps, lr, total
        self.extras, self.epoch = extras, epoch
        weights = list(model.parameters())
        groups = [{"params": weights}]
        if not extras.decay_norms:
            groups = [
                {"params": [w for w in weights if w.dim() > 1]},
                {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
            ]
        if extras.adamw:
            self.optimizer = torch.optim.AdamW(
                groups, lr, (0.9, 0.99), weight_decay=5e-4, fused=fused
            )
        else:
            self.optimizer = torch.optim.SGD(
                groups,
                lr,
                momentum=0.9,
                weight_decay=5e-4,
                nesterov=extras.nesterov,
                fused=fused,
            )
        self.done = 0
        self.batch: Any = None  # what the loop is at
        self.averaged = copy.deepcopy(model)

    @property
    def eps(self) -> float:
        if self.extras.eps:
            return self.extras.eps[self.batch.when.epoch]
        return self.step_size(self.full_eps)

    def step_size(self, alpha: float) -> float:
        """Steps grow with the ball."""
        after = self.extras.eps_after
        return alpha * min(1.0, (self.done + 1) / (after * self.epoch)) if after else alpha

    def rate(self) -> float:
        t, half, warm = self.done, self.total / 2, self.extras.cosine_after
        if self.extras.rates:
            when = self.batch.when
            return self.lr * np.interp(when.epoch + when.batch / when.batches, *self.extras.rates)
        if warm is None:
            return self.lr * (t / half if t <= half else (self.total - t) / half)
        warm *= self.epoch
        if t + 1 < warm:
            return self.lr * (t + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * max(0, t - warm) / (self.total - warm)))

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=self.extras.smoothing)

    def update(self, loss: Callable[[], Tensor]) -> None:
        extras, weights = self.extras, list(self.model.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        kept = None
        if extras.awp and self.done >= extras.awp_after * self.epoch:
            kept = self.perturb(loss, extras.awp)
        self.optimizer.zero_grad()
        loss().backward()
        if kept:
            for w, before in zip(weights, kept, strict=True):
                w.data.copy_(before)
        if extras.clip:
            torch.nn.utils.clip_grad_norm_(weights, extras.clip)
        self.optimizer.step()
        if extras.average is not None:
            epoch = self.batch.when.batches if extras.batches else self.epoch
            decay = 1 - 1 / (extras.average * epoch)
            d = min(decay, (1 + self.done) / (10 + self.done))
            now = self.model.state_dict()
            for name, mean in self.averaged.state_dict().items():
                if mean.is_floating_point():
                    mean.copy_(torch.lerp(mean, now[name], 1 - d))
        self.done += 1

    def perturb(self, loss: Callable[[], Tensor], gamma: float) -> list[Tensor]:
        """Wu et al.: a copy of the network does the probe, so that its BatchNorm stays."""
        own, self.model = self.model, copy.deepcopy(self.model)
        gradients = torch.autograd.grad(loss(), list(self.model.parameters()))
        self.model = own
        kept = [w.detach().clone() for w in own.parameters()]
        for w, gradient in zip(own.parameters(), gradients, strict=True):
            if w.dim() > 1:
                w.data += gradient * (gamma * w.data.norm() / (gradient.norm() + 1e-20))
        return kept

    def result(self) -> nn.Module:
        """What is evaluated and saved in the end."""
        return self.model if self.extras.average is None else self.averaged

    def gradient(self, x: Tensor, delta: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """As the published code does it: a full backward, and delta's gradient out of it."""
        delta = delta.clone().requires_grad_()
        self.model.zero_grad()
        F.cross_entropy(self.model(x + delta), y, reduction=reduction).backward()
        return delta.grad


def natural(run: Recipe, batches: Iterable, noise: Callable) -> None:
    for x, y, _ in batches:
        run.update(lambda x=x, y=y: run.cross_entropy(run.model(x), y))


def pgd(steps: int | tuple[int, ...], alpha: float, random: bool, mode: str = "train") -> Callable:
    """Algorithm 1, whose attack some run in eval mode, and some with other steps in each epoch."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        for x, y, keys in batches:
            delta = torch.zeros_like(x)
            if random:
                delta = clamp(-run.eps + 2 * run.eps * noise(keys), -x, 1 - x)
            run.model.train(mode == "train")
            now = steps if isinstance(steps, int) else steps[run.batch.when.epoch]
            for _ in range(now):
                delta = delta + run.step_size(alpha) * run.gradient(x, delta, y).sign()
                delta = clamp(clamp(delta, -run.eps, run.eps), -x, 1 - x)
            run.model.train()
            run.update(lambda x=x, y=y, delta=delta: run.cross_entropy(run.model(x + delta), y))

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
            moved = delta + run.step_size(alpha) * run.gradient(x, delta, y).sign()
            delta = clamp(clamp(moved, -run.eps, run.eps), -x, 1 - x)
            if init == "previous":
                kept[: len(x)] = delta
            run.update(lambda x=x, y=y, delta=delta: run.cross_entropy(run.model(x + delta), y))

    return loop


def free(replays: int) -> Callable:
    """Algorithm 2: one backward for both gradients, delta never reset."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        kept = None
        for x, y, _ in batches:
            kept = torch.zeros_like(x) if kept is None else kept
            for _ in range(replays):
                delta = kept[: len(x)].clone().requires_grad_()
                run.update(lambda x=x, y=y, delta=delta: run.cross_entropy(run.model(x + delta), y))
                moved = clamp(delta.detach() + run.eps * delta.grad.sign(), -run.eps, run.eps)
                kept[: len(x)] = clamp(moved, -x, 1 - x)

    return loop


def carrying(alpha: float) -> Callable:
    """`made_up_method.Carrying` on whole batches."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        last = table = None
        for x, y, _ in batches:
            samples, when = run.batch.samples, run.batch.when
            if last is None or table is None:
                last, table, image = torch.zeros_like(x), x.new_zeros(120, *x.shape[1:]), x[0] * 0
            added = 0.01 * rng.uniform(torch.tensor([when.key]), tuple(x.shape[1:])).to(x)
            before = last[: len(x)] + table[samples] + image
            start = (0.3 + run.done / run.total) * before + added
            start = clamp(clamp(start, -run.eps, run.eps), -x, 1 - x)
            gradient = run.gradient(x, start, y, "sum")
            delta = clamp(start + alpha * gradient.sign(), -run.eps, run.eps)
            delta = clamp(delta, -x, 1 - x)
            last[: len(x)], table[samples] = delta, 0.5 * delta
            image = image + 0.01 * gradient.sum(0).sign()
            run.update(lambda x=x, y=y, delta=delta: run.cross_entropy(run.model(x + delta), y))

    return loop


def n_fgsm(noise_in_eps: float) -> Callable:
    """De Jorge et al.: noise around the ball, one step of eps, no projection onto the ball."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        for x, y, keys in batches:
            delta = clamp(noise_in_eps * (-run.eps + 2 * run.eps * noise(keys)), -x, 1 - x)
            delta = clamp(delta + run.eps * run.gradient(x, delta, y).sign(), -x, 1 - x)
            run.update(lambda x=x, y=y, delta=delta: run.cross_entropy(run.model(x + delta), y))

    return loop


def trades(steps: int, alpha: float, beta: float) -> Callable:
    """Zhang et al.'s loop, but that x goes through the network once in train mode and not twice."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        for x, y, keys in batches:
            run.model.eval()
            clean = F.softmax(run.model(x), dim=1).detach()
            delta = clamp(0.001 * rng.normal(keys, tuple(x.shape[1:])).to(x), -x, 1 - x)
            for _ in range(steps):
                delta = delta.detach().requires_grad_()
                log_p = F.log_softmax(run.model(x + delta), dim=1)
                kl = F.kl_div(log_p, clean, reduction="sum")
                (gradient,) = torch.autograd.grad(kl, delta)
                moved = delta.detach() + run.step_size(alpha) * gradient.sign()
                delta = clamp(clamp(moved, -run.eps, run.eps), -x, 1 - x)
            run.model.train()

            def loss(x: Tensor = x, y: Tensor = y, delta: Tensor = delta) -> Tensor:
                logits = run.model(x)
                log_p = F.log_softmax(run.model(x + delta), dim=1)
                robust = F.kl_div(log_p, F.softmax(logits, dim=1), reduction="batchmean")
                return run.cross_entropy(logits, y) + beta * robust

            run.update(loss)

    return loop


def gradalign(strength: float) -> Callable:
    """Andriushchenko and Flammarion: FGSM from x, and the cosine of two input gradients."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        for x, y, keys in batches:
            here = run.gradient(x, torch.zeros_like(x), y, "sum")
            delta = clamp(run.eps * here.sign(), -x, 1 - x)
            other = -run.eps + 2 * run.eps * noise(keys)

            def loss(
                x: Tensor = x,
                y: Tensor = y,
                here: Tensor = here,
                delta: Tensor = delta,
                other: Tensor = other,
            ) -> Tensor:
                near = (x + other).requires_grad_()
                wrong = F.cross_entropy(run.model(near), y, reduction="sum")
                (there,) = torch.autograd.grad(wrong, near, create_graph=True)
                a, b = here.flatten(1), there.flatten(1)
                cosine = F.cosine_similarity(a, b, dim=1)
                loss = run.cross_entropy(run.model(x + delta), y)
                return loss + strength * (1 - cosine.mean())

            run.update(loss)

    return loop


def consistency(start: str, strength: float) -> Callable:
    """One step from a start, and logits that agree there and here.

    Pan et al.'s loop for `uap` and `cuap`, whose perturbations are of 1.25 eps and clipped to the
    ball when they are used. Jia et al.'s for `prior`, but that the norm is of each sample and that
    what is kept is not clipped to the pixels of one crop.
    """

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        kept = momentum = None
        for x, y, keys in batches:
            eps, when = run.eps, run.batch.when
            rows = {"cuap": y, "prior": run.batch.samples}.get(start, torch.zeros_like(y))
            size = eps if start == "prior" else 1.25 * eps
            if start in ("random", "noise"):
                times = 2 if start == "noise" else 1
                begin = times * (-eps + 2 * eps * noise(keys))
            elif start == "prior":
                if kept is None:
                    kept, momentum = x.new_zeros(120, *x.shape[1:]), x.new_zeros(120, *x.shape[1:])
                if when.epoch == 0:
                    kept[rows] = (noise(keys) - 0.5).sign().to(x) * size
                begin = kept[rows]
            else:
                if kept is None:
                    shape = (3 if start == "cuap" else 1, *x.shape[1:])
                    key = rng.substream(torch.tensor([when.key]), "universal")
                    kept = (rng.uniform(key, shape)[0] - 0.5).sign().to(x) * size
                    momentum = torch.zeros_like(kept)
                begin = clamp(kept[rows], -eps, eps)
            origin = begin.to(x)
            begin = clamp(begin, -x, 1 - x).to(x).requires_grad_()
            if start != "prior":
                origin = begin.detach()
            found: list[Tensor] = []

            def loss(
                x: Tensor = x,
                y: Tensor = y,
                begin: Tensor = begin,
                origin: Tensor = origin,
                found: list[Tensor] = found,
            ) -> Tensor:
                before = run.model(x + begin)
                if not found:
                    found.extend(
                        torch.autograd.grad(run.cross_entropy(before, y), begin, retain_graph=True)
                    )
                delta = origin + run.eps * found[0].sign()
                if start != "noise":
                    delta = clamp(delta, -run.eps, run.eps)
                after = run.model(x + clamp(delta, -x, 1 - x))
                return run.cross_entropy(after, y) + strength * F.mse_loss(after, before)

            run.update(loss)
            (gradient,) = found
            if start == "prior":
                norms = gradient.abs().mean((1, 2, 3), keepdim=True)
                moved = gradient / norms + 0.3 * momentum[rows]
                kept[rows] = clamp(kept[rows] + size * moved.sign(), -size, size)
                momentum[rows] = moved.half().to(x)
            elif start in ("uap", "cuap"):
                gradient = gradient / gradient.norm(p=1)
                for row in rows.unique():
                    momentum[row] = gradient[rows == row].mean(0) + 0.3 * momentum[row]
                    kept[row] = clamp(kept[row] + size * momentum[row].sign(), -size, size)

    return loop


def liet(strength: float, refresh: int, low: float, high: float, times: float) -> Callable:
    """FGSM-LIET's loop: what a label alone makes the network expect, every so many batches.

    lambda rises by updates, and random numbers are counted ones.
    """

    def smoothed(x: Tensor, y: Tensor, keys: Tensor, name: str) -> Tensor:
        rest = rng.uniform(rng.substream(keys, name), (3,)).to(x)
        rest[torch.arange(len(y)), y] = 0
        rest = 0.6 * rest / rest.sum(1, keepdim=True)
        rest[torch.arange(len(y)), y] = 0.4
        return rest

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        expected = torch.empty(0)
        for x, y, keys in batches:
            eps, when = run.eps, run.batch.when
            if when.batch % refresh == 0:
                run.model.eval()
                labels = torch.arange(3)
                grey = x.new_full((3, *x.shape[1:]), 0.5).requires_grad_()
                target = smoothed(x, labels, rng.sample_keys(when.key, labels), "label")
                F.cross_entropy(run.model(grey), target).backward()
                expected = grey.grad.sign()
                run.model.train()
            key = rng.substream(torch.tensor([when.key]), "example")
            share, side = rng.uniform(key, (2,))[0].to(x)
            hidden = rng.uniform(rng.substream(keys, "hidden"), tuple(x.shape[1:])).to(x)
            delta = eps * expected[y]
            rows = hidden < low + (high - low) * share
            delta[rows] = times * (-eps + 2 * eps * noise(keys)).to(x)[rows]
            begin = (x - delta if side < 0.5 else x + delta).clamp(0, 1) - x
            begin.requires_grad_()
            first = smoothed(x, y, keys, "label before")
            second = smoothed(x, y, keys, "label after")
            found: list[Tensor] = []

            def loss(
                x: Tensor = x,
                begin: Tensor = begin,
                first: Tensor = first,
                second: Tensor = second,
                found: list[Tensor] = found,
            ) -> Tensor:
                before = run.model(x + begin)
                if not found:
                    wrong = run.cross_entropy(before, first)
                    found.extend(torch.autograd.grad(wrong, begin, retain_graph=True))
                delta = begin.detach() + run.eps * found[0].sign()
                if times == 1:
                    delta = clamp(delta, -run.eps, run.eps)
                after = run.model(x + clamp(delta, -x, 1 - x))
                p, q = before.softmax(1), after.softmax(1)
                middle = ((p + q) / 2).log()
                apart = F.kl_div(middle, p, reduction="batchmean")
                apart = (apart + F.kl_div(middle, q, reduction="batchmean")) / 2
                return run.cross_entropy(after, second) + run.done / run.total * strength * apart

            run.update(loss)

    return loop


def guided(strength: float, nuclear: bool) -> Callable:
    """Sriramanan et al.'s GAT and NuAT, but that x goes through the network once in train mode."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        for x, y, keys in batches:
            weight = strength * (run.done / run.total if nuclear else 1)
            if not nuclear and run.done / run.total >= 0.86:
                weight = 4 * strength
            alternate = run.batch.when.batch % 2
            eps = run.eps
            begin = clamp(eps / 2 * (noise(keys) - 0.5).sign().to(x), -x, 1 - x)
            found: list[Tensor] = []

            def apart(one: Tensor, other: Tensor) -> Tensor:
                if nuclear:
                    return torch.linalg.matrix_norm(one - other, "nuc") / len(one)
                return (one.softmax(1) - other.softmax(1)).square().sum(1).mean()

            def loss(
                x: Tensor = x,
                y: Tensor = y,
                begin: Tensor = begin,
                found: list[Tensor] = found,
                weight: float = weight,
                alternate: int = alternate,
                eps: float = eps,
                apart: Callable = apart,
            ) -> Tensor:
                logits = run.model(x)
                if not found:
                    run.model.eval()
                    start = begin.clone().requires_grad_()
                    there = run.model(x + start)
                    wrong = F.cross_entropy(there, y)
                    wrong = wrong + alternate * weight * apart(logits.detach(), there)
                    (gradient,) = torch.autograd.grad(wrong, start)
                    run.model.train()
                    moved = clamp(begin + eps * gradient.sign(), -eps, eps)
                    found.append(clamp(moved, -x, 1 - x))
                adversarial = run.model(x + found[0])
                return run.cross_entropy(logits, y) + weight * apart(logits, adversarial)

            run.update(loss)

    return loop


def mart(steps: int, alpha: float, beta: float) -> Callable:
    """Wang et al.'s loop."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        for x, y, keys in batches:
            run.model.eval()
            delta = clamp(0.001 * rng.normal(keys, tuple(x.shape[1:])).to(x), -x, 1 - x)
            for _ in range(steps):
                moved = delta + run.step_size(alpha) * run.gradient(x, delta, y).sign()
                delta = clamp(clamp(moved, -run.eps, run.eps), -x, 1 - x)
            run.model.train()

            def loss(x: Tensor = x, y: Tensor = y, delta: Tensor = delta) -> Tensor:
                clean, adversarial = run.model(x).softmax(1), run.model(x + delta)
                q = adversarial.softmax(1)
                order = q.argsort(1)[:, -2:]
                other = torch.where(order[:, 1] == y, order[:, 0], order[:, 1])
                rows = torch.arange(len(y))
                boosted = run.cross_entropy(adversarial, y)
                boosted = boosted - torch.log(1.0001 - q[rows, other] + 1e-12).mean()
                kl = F.kl_div(torch.log(q + 1e-12), clean, reduction="none").sum(1)
                return boosted + beta * (kl * (1.0000001 - clean[rows, y])).mean()

            run.update(loss)

    return loop


def sora(run: Recipe, batches: Iterable, noise: Callable) -> None:
    """From the paper's formulas, but that samples without a gradient count as curved."""
    linearity = torch.full((1,), 0.99)
    for x, y, keys in batches:
        eta = clamp(-run.eps + 2 * run.eps * noise(keys), -x, 1 - x)
        start = eta.clone().requires_grad_()
        (first,) = torch.autograd.grad(run.cross_entropy(run.model(x + start), y), start)
        longest = 2 * run.eps * torch.clamp(0.02 / (1 - linearity), max=1)
        share = rng.uniform(rng.substream(keys, "share"), tuple(x.shape[1:])).to(x)
        delta = clamp(eta + longest * share * first.sign(), -x, 1 - x).requires_grad_()
        run.update(lambda x=x, y=y, delta=delta: run.cross_entropy(run.model(x + delta), y))
        of_each = (first.sign() * delta.grad).sum((1, 2, 3)) / first.abs().sum((1, 2, 3))
        linearity = 0.95 * linearity + 0.05 * of_each.mean().clamp(-1, 1)


def aaer(noise_in_eps: float, alpha: float, strength: float) -> Callable:
    """Lin et al.'s loop on N-FGSM, as their code computes it."""

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        for x, y, keys in batches:
            eta = clamp(noise_in_eps * (-run.eps + 2 * run.eps * noise(keys)), -x, 1 - x)
            eta = eta.requires_grad_()
            noisy = run.model(x + eta)
            (gradient,) = torch.autograd.grad(F.cross_entropy(noisy, y), eta)
            before = noisy.detach()
            delta = clamp(eta.detach() + alpha * gradient.sign(), -x, 1 - x)

            def loss(
                x: Tensor = x, y: Tensor = y, delta: Tensor = delta, before: Tensor = before
            ) -> Tensor:
                after = run.model(x + delta)
                first = F.cross_entropy(before, y, reduction="none")
                lowered = first > F.cross_entropy(after, y, reduction="none")
                total = run.cross_entropy(after, y)
                if 0 < lowered.sum() < len(y):
                    moved = (before - after).square().sum(1)
                    more = moved[lowered].mean() - moved[~lowered].mean().detach()
                    share = lowered.sum().item() / len(y)
                    total = total + strength * share * more.clamp_min(0)
                return total

            run.update(loss)

    return loop


def adr(steps: int, alpha: float) -> Callable:
    """Wu et al.'s loop, PGD training with its targets; the teacher is the run's own average."""

    def between(first: float, last: float, done: float) -> float:
        return last + 0.5 * (first - last) * (1 + math.cos(math.pi * done))

    def loop(run: Recipe, batches: Iterable, noise: Callable) -> None:
        for x, y, keys in batches:
            done = run.done / run.total
            with torch.no_grad():
                q = F.softmax(run.averaged.eval()(x) / between(2.5, 2.0, done), dim=1)
            rows = torch.arange(len(y))
            share = (between(0.7, 0.95, done) - (q.max(1)[0] - q[rows, y])).clamp(0, 1)
            target = share[:, None] * q + (1 - share[:, None]) * F.one_hot(y, q.shape[1])
            delta = clamp(-run.eps + 2 * run.eps * noise(keys), -x, 1 - x)
            for _ in range(steps):
                moved = delta + run.step_size(alpha) * run.gradient(x, delta, target).sign()
                delta = clamp(clamp(moved, -run.eps, run.eps), -x, 1 - x)

            def loss(x: Tensor = x, target: Tensor = target, delta: Tensor = delta) -> Tensor:
                return run.cross_entropy(run.model(x + delta), target)

            run.update(loss)

    return loop
