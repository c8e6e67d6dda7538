"""Free adversarial training (Shafahi et al. 2019; Algorithm 2 of Free against Fast)."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.base import Method, MethodOptions, Net, Objective, Task
from dist_adv.methods.carried import ByPosition
from dist_adv.options import PositiveInt


class FreeOptions(MethodOptions):
    """m = `replays` optimiser steps on every minibatch.

    `train.epochs` counts how often all images are seen and is not divided by m: 45 epochs with m
    replays are 45 m epochs' worth of updates, as in the published runs. For Algorithm 2's N / m
    epochs, write that number.
    """

    name: str = "free"
    replays: Annotated[PositiveInt, Field(title="m")] = 8


class Free(Method[FreeOptions]):
    """m replays a minibatch; one backward gives the weights' gradient and delta's.

    After each update delta takes a step of the whole radius along its gradient. It is carried
    from minibatch to minibatch, so early replays start from the last images'.
    """

    title = "Free"
    about = (
        "On each batch m times in a row: the backward pass that gives the weights' gradient also "
        "gives the perturbation's, so attacking costs no pass of its own."
    )
    soft_labels = True

    def __init__(self, options: FreeOptions, task: Task) -> None:
        super().__init__(options, task)
        self.steps_per_batch = options.replays
        self.delta = ByPosition()

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        delta, project = self.delta.read(batch.x), threat.around(batch.x)
        for _ in range(self.options.replays):
            delta = delta.detach().requires_grad_()
            yield self.minimise(net, batch.x + delta, batch.y)
            assert delta.grad is not None
            delta = project(threat.ascend(delta.detach(), delta.grad, threat.eps))
        self.delta.write(delta)
