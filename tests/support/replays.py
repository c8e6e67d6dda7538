"""A stand-in for CUDA graphs on a CPU: what passes returned is overwritten when torch would do so.

torch's CUDAGraphTreeManager lets a pass that begins a new step take the memory of all passes before
it, and whoever reads their results then reads what the new pass wrote there. Here the passes are
computed as they are, and at the same moments by the same rules (`can_start_new_generation` in
torch/_inductor/cudagraph_trees.py) those results that somebody still holds become NaN. What a
stand-in cannot show is what recording itself refuses, and streams.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.mutation_guard import GenerationTracker
from torch._inductor.cudagraph_trees import MarkStepBox
from torch.multiprocessing.reductions import StorageWeakRef

from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.methods import Method, MethodOptions, Net, Objective, Step, Task

Passes = Callable[..., list[Any]]
compile_in_place = nn.Module.compile


class Replays:
    """Compiles a network so that results are overwritten, or only counts (`overwriting=False`).

    Inputs that are no weights or statistics are copied into memory of the passes, as a recording
    does. overwritten: results that somebody held when their memory was given away.
    """

    def __init__(self, overwriting: bool = True) -> None:
        self.overwriting, self.calls, self.overwritten = overwriting, 0, 0
        self._held: dict[int, StorageWeakRef] = {}
        self._step, self._waits_for_backward = -1, False

    def compile(self, model: nn.Module) -> None:
        """Compile in place, as `nn.Module.compile` does, for which this stands in."""
        self._fixed = {each.data_ptr() for each in [*model.parameters(), *model.buffers()]}
        backend = aot_autograd(
            fw_compiler=self._kind("forward"),
            bw_compiler=self._kind("backward"),
            inference_compiler=self._kind("inference"),
        )
        compile_in_place(model, backend=backend, dynamic=False)

    def _kind(self, kind: str) -> Callable[[torch.fx.GraphModule, list[Tensor]], Passes]:
        def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> Passes:
            return make_boxed_func(lambda *inputs: self._run(kind, graph, inputs))

        return compiler

    def _run(self, kind: str, graph: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
        self.calls += 1
        marked = MarkStepBox.mark_step_counter
        step = marked or GenerationTracker.generation
        if step != self._step and (marked or not self._waits_for_backward):
            self._give_memory_away()
        self._step = step
        outputs = graph(*[self._in_memory_of_passes(each) for each in inputs])
        for each in outputs:
            if isinstance(each, Tensor) and not self._is_fixed(each):
                storage = each.untyped_storage()
                self._held[storage.data_ptr()] = StorageWeakRef(storage)
        if kind != "inference":
            self._waits_for_backward = kind == "forward"
        return outputs

    def _in_memory_of_passes(self, each: Any) -> Any:
        if not isinstance(each, Tensor) or self._is_fixed(each):
            return each
        held = self._held.get(each.untyped_storage().data_ptr())
        if held is not None and not held.expired():
            return each  # from a pass before this one
        return each.detach().clone()

    def _is_fixed(self, each: Tensor) -> bool:
        return each.data_ptr() in self._fixed

    def _give_memory_away(self) -> None:
        for held in self._held.values():
            if not held.expired():
                self.overwritten += 1
                if self.overwriting:
                    torch.UntypedStorage._new_with_weak_ptr(held.cdata).fill_(0xFF)  # NaN
        self._held.clear()


class KeepingOptions(MethodOptions):
    cloned: bool = False


class Keeping(Method[KeepingOptions]):
    """Ordinary training that draws logits to those of the batch before: kept over a replay."""

    def __init__(self, options: KeepingOptions, task: Task) -> None:
        super().__init__(options, task)
        self.before: Tensor | None = None

    def steps(self, net: Net, batch: Batch, threat: Threat) -> Iterator[Objective]:
        def objective() -> Step:
            logits, kept = net(batch.x), self.before
            loss = self.task.loss(logits, batch.y)
            if kept is not None:
                loss = loss + 0.1 * (logits.mean(0) - kept.mean(0)).square().sum()
            self.before = logits.detach().clone() if self.options.cloned else logits.detach()
            return Step(loss, logits)

        yield objective
