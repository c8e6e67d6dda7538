"""Adversarial weight perturbation (Wu, Xia and Wang 2020), around whatever a method minimises."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from dist_adv.distributed.ddp import TrainNet
from dist_adv.methods import Objective


class WeightPerturbation:
    """min over w of max over v of L(w + v), ||v_l|| <= gamma ||w_l|| for each layer's weights.

    A probe gives the gradient g of the global batch's loss, v_l = gamma ||w_l|| g_l / ||g_l||; the
    step is taken at w from the gradient at w + v. Norms and biases, of one dimension, stay, as do
    weights that are not trained. BatchNorm's statistics do not move in the probe. Where the probe
    is not finite, v is 0. The published code steps at w + v and subtracts v then, so that weight
    decay sees w + v; here the weights come back exactly before the step, also where it is not
    taken.
    """

    def __init__(self, accelerator: Accelerator, net: TrainNet, gamma: float) -> None:
        self.accelerator, self.net, self.gamma = accelerator, net, gamma
        self.weights: list[Tensor] = [
            each for each in net.bare.parameters() if each.dim() > 1 and each.requires_grad
        ]

    @contextmanager
    def worst_weights_nearby(self, parts: Sequence[tuple[Objective, float]]) -> Iterator[None]:
        """Hold the weights at w + v. parts: of a batch, each weighted. Every rank calls this."""
        gradients = self._probe(parts)
        before = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            for weight, gradient in zip(self.weights, gradients, strict=True):
                scale = self.gamma * weight.norm() / (gradient.norm() + 1e-20)
                weight.add_(gradient * scale)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, before)

    def _probe(self, parts: Sequence[tuple[Objective, float]]) -> list[Tensor]:
        """Return the gradients of the weights, the same on every rank; 0 where one is not finite.

        By `autograd.grad`: leaf tensors of the method's own (Free's perturbation) get no gradient.
        """
        buffers = list(self.net.bare.buffers())
        before = [buffer.clone() for buffer in buffers]
        mine: list[Tensor] = []
        for objective, share in parts:
            with self.accelerator.no_sync(self.net.prepared):
                loss = objective().loss * share
            scaler = self.accelerator.scaler  # fp16: without it small gradients underflow
            loss = scaler.scale(loss) if scaler else loss
            gradients = torch.autograd.grad(
                loss, self.weights, allow_unused=True, materialize_grads=True
            )
            if mine:
                torch._foreach_add_(mine, gradients)
            else:
                mine = list(gradients)
        torch._foreach_copy_(buffers, before)
        flat = self.accelerator.reduce(torch.cat([each.flatten() for each in mine]), "mean")
        flat = torch.where(flat.isfinite().all(), flat, 0)
        pieces = flat.split([each.numel() for each in mine])
        # Into the gradients' own memory, whose order decides how their norms are summed.
        return [each.copy_(piece.view_as(each)) for piece, each in zip(pieces, mine, strict=True)]
