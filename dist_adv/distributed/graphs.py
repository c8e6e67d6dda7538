"""CUDA graphs, as torch.compile records them: where a step begins, and what was not recorded."""

import logging

import torch

from dist_adv.errors import UserError

RECORDED = frozenset({"graphs", "max"})
"""The choices of `train.compile` under which passes are recorded and replayed on GPUs."""


def check_graphs(choice: str, cpu: bool) -> None:
    """Raise UserError where a run asks for CUDA graphs by name and trains on a CPU."""
    if choice == "graphs" and cpu:
        raise UserError(
            "train.compile: graphs are recorded on GPUs, and this run is on a CPU; use default"
        )


def begin_batch(choice: str) -> None:
    """Let the passes of the batch that begins take the memory of the last one's results.

    A replay writes its results where the one before it did. Left alone, torch takes each forward
    for a step of its own unless one still waits for a backward, any backward: the attack between
    the two forwards of GAT, the first of the two backwards of `consistency`, the first part of a
    batch (`train.accumulate`) would give away activations and gradients that are needed yet. With
    marks, what a network returns, and what it keeps for its backward, holds until the next batch.
    """
    if choice in RECORDED:
        torch.compiler.cudagraph_mark_step_begin()


class _Reasons(logging.Filter):
    """Keeps why torch would not record a pass. The line of ours replaces torch's own, of many
    lines, unless TORCH_LOGS asks for them.
    """

    log = logging.getLogger("torch._inductor.cudagraph_utils.__cudagraphs")

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        line = record.getMessage().splitlines()[0].split(". Found from")[0]
        if not line.startswith("skipping cudagraph"):
            return True
        self.kept.append(line.partition(" due to ")[2])
        return self.log.isEnabledFor(logging.DEBUG)


_REASONS = _Reasons()


class SkippedGraphs:
    """How many passes of this process torch would not record, and why.

    Such a pass takes as long as under `train.compile: default`. torch finds out when it compiles a
    pass or runs it first, or later where what a pass is given lies elsewhere each time.
    """

    def __init__(self) -> None:
        _REASONS.log.addFilter(_REASONS)  # once, however often
        self._before = _counted()

    def news(self) -> str:
        """Say what was skipped since the last call; empty where nothing was. Waits for nothing."""
        number = _counted() - self._before
        self._before += number
        reasons = list(dict.fromkeys(_REASONS.kept))
        _REASONS.kept.clear()
        if number <= 0:
            return ""
        why = "; ".join(reasons) or "TORCH_LOGS=cudagraphs says why"
        return f"{number} pass(es) of the network are not replayed as CUDA graphs ({why})"


def _counted() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])
