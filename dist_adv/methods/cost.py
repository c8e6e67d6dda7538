"""What a step of a method costs, counted on a network of a few layers and not known."""

import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_adv import plugins
from dist_adv.attacks import frozen
from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch, When
from dist_adv.errors import RunFailure, UserError
from dist_adv.methods.base import MethodOptions, Task
from dist_adv.methods.carried import ByPosition
from dist_adv.methods.checked import checked_steps
from dist_adv.methods.registry import build_method


@dataclass(frozen=True)
class Cost:
    """What a batch takes, in forward passes of an image; each gradient's backward is one, too.

    steps: optimiser steps; passes: of each, natural training has 3 (forward, gradients of the
    activations, gradients of the weights); backward: those of them in which the weights'
    gradients become ready to be sent. whole_batch: it computes over a whole batch, or keeps
    something for each position of one, and so cannot take it in parts.
    """

    steps: int
    passes: float
    backward: float
    whole_batch: bool = field(default=False, compare=False)

    @property
    def against_natural(self) -> float:
        """How many batches of natural training take as long."""
        return self.steps * self.passes / 3


_LAYERS = 4
_SMALL = torch.Size((1, 4, 4))


class _Passes(TorchDispatchMode):
    """Counts products of matrices: each of the toy's layers has one in every pass.

    forward: the toy is in one; a method may have products of its own. double_backward: there was
    a backward pass that can be differentiated itself.
    """

    done = 0.0
    forward = False
    double_backward = False

    def __init__(self, toy: nn.Module) -> None:
        super().__init__()
        toy.register_forward_pre_hook(lambda *_: setattr(self, "forward", True))
        toy.register_forward_hook(lambda *_: setattr(self, "forward", False))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        in_backward = torch._C._current_graph_task_id() != -1
        if func is torch.ops.aten.mm.default and (self.forward or in_backward):
            self.done += 1 / _LAYERS
            self.double_backward |= in_backward and torch.is_grad_enabled()
        return func(*args, **(kwargs or {}))


class _Toy(nn.Module):
    """Linear layers. The factor asks for the first one's input gradient, as images do not."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(pixels))
        sizes = [pixels, *[8] * (_LAYERS - 1), classes]
        self.layers = nn.Sequential(
            *(
                layer
                for inner, outer in itertools.pairwise(sizes)
                for layer in (nn.Tanh(), nn.Linear(inner, outer, bias=False))
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.factor * x.flatten(1))


class _ToyNet:
    """A network as methods see it, on one rank.

    averages: its average was asked for; kept_graph: a forward was differentiated twice; sums: over
    ranks were asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.averages, self.kept_graph, self.sums = model, False, False, False

    def __call__(self, x: Tensor) -> Tensor:
        logits, times = self.model(x), itertools.count()

        def differentiated(gradient: Tensor) -> None:
            self.kept_graph |= next(times) > 0

        logits.register_hook(differentiated)
        return logits

    def frozen(self, mode: Literal["train", "eval"] = "train") -> AbstractContextManager[nn.Module]:
        return frozen(self.model, eval_mode=mode == "eval")

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        self.sums = True
        return value.detach()

    def averaged(self, x: Tensor) -> Tensor:
        self.averages = True
        with torch.no_grad():
            return self.model(x)


def cost_of(
    options: MethodOptions,
    threat: Threat,
    shape: torch.Size = _SMALL,
    classes: int = 10,
    perturbed: bool = False,
) -> Cost:
    """Return what a batch costs with these options, from a batch of two made-up images.

    shape: (C, H, W) of an image. perturbed: with AWP, which takes each objective's gradient twice.

    Raises UserError naming file and line where the method fails, or yields what it may not; and
    for a need that it does not declare.
    """
    x, two = torch.full((2, *shape), 0.5), torch.arange(2)
    task = Task(F.cross_entropy, samples=2, shape=shape, classes=classes, device=x.device)
    # Not an epoch's first, for which a method may have to make something ready.
    when = When(0, 1, 2, key=0)
    batch = Batch(x, two % classes, two, two, total=2, weight=1.0, when=when)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _ToyNet(_Toy(shape.numel(), classes))
    steps, backward = 0, 0.0
    try:
        method = build_method(options, task)
        with _Passes(net.model) as passes:
            for objective in checked_steps(method, net, batch, threat):
                if perturbed:
                    objective().loss.backward()
                loss = objective().loss
                before = passes.done
                loss.backward()
                backward += passes.done - before
                steps += 1
    except UserError:
        raise
    except RunFailure as fault:
        raise UserError(f"method.name: {options.name}: {fault}") from fault
    except Exception as error:
        raise UserError(
            f"method.name: {options.name} fails on two images: {plugins.told(error)}"
        ) from error
    seen = {
        "double backward": passes.double_backward,
        "kept graph": net.kept_graph and not passes.double_backward,
        "average": net.averages,
    }
    unsaid = {need for need, needed in seen.items() if needed} - method.needs
    if unsaid:
        raise UserError(f"method.name: {options.name} must say what it needs: needs = {unsaid}")
    positions = (each for each in method.carried().values() if isinstance(each, ByPosition))
    whole_batch = net.sums or any(each.rows is not None for each in positions)
    return Cost(steps, round(passes.done / steps, 4), round(backward / steps, 4), whole_batch)
