"""The exponential average of the weights, which is what a run with one evaluates and saves."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_adv.distributed.collectives import mean_statistics
from dist_adv.distributed.ddp import TrainNet
from dist_adv.models import Classifier


class Average:
    """w_bar <- w_bar + (1 - d) (w - w_bar) after every optimiser step t = 0, 1, ...

    d = min(decay, (1 + t) / (10 + t)): early averages forget faster, so that they are not of the
    first weights. BatchNorm's running statistics are averaged likewise, each rank's own. Every
    rank computes the same weights, so nothing is sent.

    network: holds the average, and starts as `net` does. decay: to be set before the first step.
    """

    decay: float

    def __init__(self, network: Classifier, net: TrainNet) -> None:
        self.network = network.eval()
        network.load_state_dict(net.state_dict())  # a given network's may differ between ranks
        self.average = [*network.parameters(), *statistics(network).values()]
        self.trained = [*net.bare.parameters(), *statistics(net.bare).values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimiser step number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.trained, 1 - decay)

    def copy_into(self, accelerator: Accelerator, model: nn.Module) -> None:
        """Copy the average into another network, statistics averaged over ranks."""
        model.load_state_dict(mean_statistics(accelerator, self.network.state_dict()))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return BatchNorm's running means and variances by their names."""
    return {name: each for name, each in model.named_buffers() if "running_" in name}
