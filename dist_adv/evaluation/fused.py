"""A network in evaluation whose layers torch.compile fuses."""

import torch
from torch import Tensor, nn

from dist_adv.attacks import frozen


class Fused(nn.Module):
    """The network itself, which is not changed: the same weights, in eval mode.

    Compiled for any number of images, as attacks ask with fewer and fewer: a graph with gradients
    and one without. A single image is answered as before: torch would make a graph of one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.compiled = model, torch.compile(model)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, classes) of x (n, C, H, W)."""
        if len(x) == 1:
            return self.model(x)
        if torch.is_grad_enabled():
            return self._answer(x)
        # torch would make another graph in `inference_mode`, and of tensors that come from there.
        with torch.inference_mode(False), torch.no_grad():
            return self._answer(x.clone() if x.is_inference() else x)

    def _answer(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # another layout has another graph
        torch._dynamo.maybe_mark_dynamic(x, 0)
        with frozen(self.model):  # as in attacks: so do weights with gradients
            return self.compiled(x)
