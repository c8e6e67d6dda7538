"""What the ranks of a run have to agree on while it runs: when to stop, and when to save.

Over gloo in host memory, also where gradients travel over NCCL: nothing here waits for a GPU, and
a rank that dies is noticed at once, because its connection closes.
"""

import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from dist_adv.config import TrainOptions
from dist_adv.distributed.stopping import REASONS, Stopping
from dist_adv.distributed.watchdog import Watchdog
from dist_adv.errors import Preempted

T = TypeVar("T")

# A dead rank closes its connections, a hanging one is the watchdog's: this is for neither.
_LONG = timedelta(hours=24)


class Session:
    """One start of a run on this process. Every rank makes the same calls in the same order."""

    def __init__(self, accelerator: Accelerator, run_dir: Path, options: TrainOptions) -> None:
        rank, ranks = accelerator.process_index, accelerator.num_processes
        self.main, self.ranks = rank == 0, ranks
        self.stopping = Stopping(run_dir, options.max_minutes, self.main)
        self.group: Any = dist.new_group(backend="gloo", timeout=_LONG) if ranks > 1 else None
        self.watchdog = Watchdog(options.timeout_minutes, rank, ranks, self._others(rank))
        self.asked: tuple[Any, torch.Tensor] | None = None
        self.save_seconds = 60 * options.save_minutes if options.save_minutes else None
        self.saved = time.monotonic()

    def boundary(self) -> tuple[str, bool]:
        """(why all ranks stop here or '', whether they save here), the same on every rank.

        What was asked at the last boundary is answered at this one: the ranks talk while they
        train and do not wait for each other. Alone, the answer comes at once.
        """
        self.watchdog.beat()
        return self._agree()

    def between_chunks(self) -> None:
        """Stop in an evaluation, where a rank may wait long for another's share.

        Raises Preempted, on all ranks at the same chunk: there is nothing to save.
        """
        self.watchdog.pause()
        stop, _ = self._agree()
        if stop:
            raise Preempted(stop)

    def gather(self, mine: T) -> list[T]:
        """Every rank's object on the main process; nothing elsewhere."""
        if self.group is None:
            return [mine]
        everyone: list[T | None] | None = [None] * self.ranks if self.main else None
        dist.gather_object(mine, everyone, dst=0, group=self.group)
        return everyone or []  # type: ignore[return-value]

    def leave(self) -> None:
        """Wait for every rank; from here on each may exit."""
        if self.group is not None:
            dist.barrier(self.group)
        self.close()

    def close(self) -> None:
        """End the watch over the ranks."""
        self.watchdog.close()

    def _others(self, rank: int) -> dict[int, int]:
        """Process ids of the other ranks that the same launcher has started on this machine."""
        if self.group is None:
            return {}
        everyone: list[Any] = [None] * self.ranks
        launcher = socket.gethostname(), os.getppid()
        dist.all_gather_object(everyone, (launcher, os.getpid()), group=self.group)
        return {
            other: pid
            for other, (its_launcher, pid) in enumerate(everyone)
            if its_launcher == launcher and other != rank
        }

    def _agree(self) -> tuple[str, bool]:
        question = torch.tensor([self.stopping.reason(), self._save_is_due()])
        if self.group is None:
            answer = question
        else:
            answer = torch.zeros_like(question)
            if self.asked:
                work, answer = self.asked
                work.wait()
            self.asked = dist.all_reduce(question, dist.ReduceOp.MAX, self.group, True), question
        stop, save = answer.tolist()
        return REASONS[stop], bool(save)

    def _save_is_due(self) -> bool:
        now = time.monotonic()
        if not self.main or self.save_seconds is None or now - self.saved < self.save_seconds:
            return False
        self.saved = now
        return True
