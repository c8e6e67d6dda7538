"""How nearly a network's loss is a plane within the ball."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_adv.attacks.pgd import cross_entropy, frozen, input_gradient
from dist_adv.attacks.threat import Threat


def alignment(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Return the cosine, (n,), of input gradients at x and at the end of a step of eps from there.

    x: images (n, C, H, W) in [0, 1]; y: labels (n,). 0 where a gradient is 0 or not finite.
    """

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, y)

    with frozen(model):
        _, here = input_gradient(model, x, torch.zeros_like(x), loss)
        step = threat.project(threat.ascend(torch.zeros_like(x), here, threat.eps), x)
        _, there = input_gradient(model, x, step, loss)
    # In double precision, in which no small gradient's square is 0.
    ends = here.double().flatten(1), there.double().flatten(1)
    return F.cosine_similarity(*ends, eps=1e-100).nan_to_num(0.0)
