"""What a method yields, checked: a fault in somebody's method is said in a line of its file."""

import inspect
from collections.abc import Iterator
from typing import Any

from dist_adv.attacks.threat import Threat
from dist_adv.data import Batch
from dist_adv.errors import RunFailure
from dist_adv.methods.base import Method, Net, Objective, Step


def checked_steps(
    method: Method[Any], net: Net, batch: Batch, threat: Threat
) -> Iterator[Objective]:
    """Yield the objectives of a batch; each says what is wrong with its loss and logits.

    Looks at shapes only, and so waits for no device.

    Raises RunFailure naming file and line.
    """
    steps, count = method.steps(net, batch, threat), 0
    if not inspect.isgenerator(steps):
        raise _fault(method, None, "steps is no generator; yield an objective for each step")
    for objective in steps:
        count += 1
        where = steps.gi_frame.f_lineno if steps.gi_frame else None
        if count > method.steps_per_batch:
            raise _fault(method, where, f"yields more than {_promised(method)}")
        if not callable(objective):
            raise _fault(method, where, "yields no function; yield one that returns a Step")
        yield _Checked(method, where, objective, batch)
    if count < method.steps_per_batch:
        raise _fault(method, None, f"yields {count} and not {_promised(method)}")


def _promised(method: Method[Any]) -> str:
    return f"the {method.steps_per_batch} objective(s) that steps_per_batch says"


class _Checked:
    """An objective that looks at what it returns."""

    def __init__(
        self, method: Method[Any], line: int | None, objective: Objective, batch: Batch
    ) -> None:
        self.method, self.line, self.objective, self.batch = method, line, objective, batch

    def __call__(self) -> Step:
        out = self.objective()
        shape = (len(self.batch.y), self.method.task.classes)
        if not isinstance(out, Step):
            problem = f"returns {type(out).__name__}; return a Step(loss, logits)"
        elif out.loss.dim() != 0:
            problem = (
                f"has a loss of shape {tuple(out.loss.shape)}; take the mean over the batch's "
                f"samples"
            )
        elif not out.loss.requires_grad:
            problem = "has a loss without a gradient; compute it from net(x), which is not frozen"
        elif out.logits.shape != shape:
            problem = (
                f"has logits of shape {tuple(out.logits.shape)}; give those of this batch, {shape}"
            )
        else:
            return out
        raise _fault(self.method, self.line, f"yields an objective that {problem}")


def _fault(method: Method[Any], line: int | None, problem: str) -> RunFailure:
    steps = inspect.unwrap(type(method).steps)
    file = inspect.getsourcefile(steps) or "?"
    at = line or steps.__code__.co_firstlineno
    return RunFailure(f"{file}, line {at}: {type(method).__name__} {problem}")
