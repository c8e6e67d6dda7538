"""The interface between a training method and the engine.

A method yields what to minimise; the engine takes one optimiser step for each. After a `yield` the
weights have moved and the gradients of whatever leaf tensors went into the loss are there, which
is all that Free needs. A method knows nothing of Accelerate, files or logging.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn

from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods.carried import Carried
from dist_adv.options import Options

Guard = Literal["none", "warn", "stop"]
"""Against catastrophic overfitting: do nothing, say so, or stop with the last good weights."""

Need = Literal["double backward", "kept graph", "average"]
"""What a method asks of the engine that not every run can give; a run that cannot is refused.

double backward: a loss with a gradient in it. kept graph: an input gradient out of a training
forward that is in the loss as well. average: `net.averaged`. A method that needs one without
saying so is refused, too (`cost.cost_of`).
"""


AttackMode = Literal["train", "eval"]
"""How a network normalises, and whether it drops layers, while its images are attacked."""


class MethodOptions(Options):
    """What every training method has. A method's own options come with their defaults."""

    name: str
    guard: Guard = "none"
    """What is done about catastrophic overfitting, for which each epoch is looked at: `stop` ends
    the run with the weights from before it."""
    guard_rule: Literal["gap", "wong"] = "gap"
    """When an epoch has collapsed: PGD-5 accuracy on fixed training images parted from FGSM
    accuracy; or fell by more than 0.2 from batch to batch, as Wong et al. 2020 have it."""


@dataclass(frozen=True)
class Task:
    """What a method trains for.

    loss: logits (n, classes) and labels (n,), or probabilities (n, classes), to the mean
    cross-entropy, smoothed as `train.label_smoothing` says. samples: images of the training split;
    shape: (C, H, W) of one.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    samples: int
    shape: torch.Size
    classes: int
    device: torch.device


class Net(Protocol):
    """The network as a method sees it."""

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of a training forward, whose backward gives the weights their gradients.

        They, and gradients, hold until the next batch: copy what is kept longer. Under
        `train.compile: graphs` the next batch's are written where they are.
        """

    def frozen(self, mode: Literal["train", "eval"] = "train") -> AbstractContextManager[nn.Module]:
        """Return the bare module for input gradients: no weight gradients, no communication.

        eval: BatchNorm normalises by its running statistics, which are this rank's own.
        """

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor of the same shape on every rank, without a gradient.

        Every rank calls this as often, in the same order.
        """

    def averaged(self, x: Tensor) -> Tensor:
        """Logits of the averaged weights (`average`), in eval mode, without a gradient.

        For methods whose `needs` have `average`.
        """


@dataclass(frozen=True)
class Step:
    """What one optimiser step is taken from.

    loss: the mean over this rank's samples; logits: (n, classes), for the training accuracy;
    scalars: further means over this rank's samples, to be logged by these names.
    """

    loss: Tensor
    logits: Tensor
    scalars: Mapping[str, Tensor] = field(default_factory=dict)


Objective = Callable[[], Step]
"""What a step minimises, at the weights as they are when it is called.

The engine calls it once, or twice where it looks for the worst weights nearby first (`awp`).
"""

OptionsT = TypeVar("OptionsT", bound=MethodOptions)


class Method(ABC, Generic[OptionsT]):
    """How to train on a batch. `class Mine(Method[MineOptions])` has its options so.

    What is carried from batch to batch is kept in attributes of one of the kinds of `carried.py`:
    the engine saves and restores those and nothing else.
    """

    Options: ClassVar[type[MethodOptions]]
    title: ClassVar[str] = ""
    """The printed name; the class's where there is none."""
    about: ClassVar[str] = ""
    """One sentence for a report's reader: what it trains on."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    """The threats that it is made for."""
    soft_labels: ClassVar[bool] = False
    """Whether it learns from `batch.y` of probabilities (n, classes), which mixed images have."""

    steps_per_batch: int = 1
    """How many objectives `steps` yields."""
    caution: str = ""
    """What is known to go wrong with these options for this task; a run begins with it."""

    def __init__(self, options: OptionsT, task: Task) -> None:
        self.options, self.task = options, task

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for base in cls.__dict__.get("__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, MethodOptions):
                    cls.Options = argument

    @abstractmethod
    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        """Yield an objective for every optimiser step that this batch is worth.

        threat: the ball of this batch, which grows while it is warmed up.
        """

    def minimise(self, net: Net, x: Tensor, y: Tensor) -> Objective:
        """Return the ordinary objective: the task's loss of the network at x."""

        def objective() -> Step:
            logits = net(x)
            return Step(self.task.loss(logits, y), logits)

        return objective

    def carried(self) -> dict[str, Carried]:
        """Return what is carried from batch to batch, by the name of the attribute."""
        return {name: each for name, each in vars(self).items() if isinstance(each, Carried)}
