"""What goes wrong beneath us, in one line: memory, compilers, lost ranks, others' code."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator

from dist_adv import plugins
from dist_adv.errors import GOES_ON, SAID, LostRank, RankFailure, RunFailure
from dist_adv.text import said


@contextmanager
def plain_failures(accelerator: Accelerator, key: str, batch_size: int) -> Iterator[None]:
    """Say in one line what goes wrong beneath us: memory, ranks that are gone, others' code.

    key: of the batch size, in the section of what is done.

    Raises RankFailure where this process has no memory left, naming `key` and half of
    `batch_size`, or the line of somebody's own code that failed; LostRank where another process
    has left.
    """
    try:
        yield
    except Exception as error:
        rank, ranks = accelerator.process_index, accelerator.num_processes
        failure = _plain(error, f"rank {rank} of {ranks}", key, batch_size)
        if failure is None:
            raise
        raise failure from error


def _plain(error: Exception, rank: str, key: str, batch_size: int) -> RunFailure | None:
    """Return what to say of an error; None where it says all by itself, or is nobody's but ours."""
    text = str(error)
    memory = ("not enough memory", "can't allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in memory)
    ):
        return RankFailure(
            f"{rank} has no memory left ({reason(error)}); try {key}="
            f"{max(1, batch_size // 2)} instead of {batch_size}, a narrower model or more ranks"
        )
    if isinstance(error, RuntimeError):
        if "can't start new thread" in text:
            return RankFailure(
                f"{rank} may not start another thread; raise ulimit -u, or lower "
                f"data.workers and train.threads"
            )
        if "Duplicate GPU" in text:  # NCCL's words
            return RankFailure(
                f"{rank} has the GPU of another rank: there are {torch.cuda.device_count()} here; "
                f"start no more ranks (NPROC, --nproc-per-node), or see CUDA_VISIBLE_DEVICES"
            )
        signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
        if isinstance(error, dist.DistError) or any(sign in text for sign in signs):
            return LostRank(
                f"{rank} lost another rank ({reason(error)}); the launcher says "
                f"which one; {GOES_ON}"
            )
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            key = f"{key.partition('.')[0]}.compile"
            return RankFailure(
                f"{key}: torch.compile failed on {rank} "
                f"({reason(error)}); set {key}=none, or install a C++ compiler"
            )
    where = "" if isinstance(error, SAID) else plugins.blamed(error)
    return RankFailure(f"{rank}: {where}{said(error)}") if where else None


def reason(error: BaseException) -> str:
    """Return the first sentence of torch's message, without the place in its source."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^]]*\] *(err == 0\. )?", "", lines[0]).split(". ")[0].rstrip(".")
