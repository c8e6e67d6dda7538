"""What goes wrong beneath us, in one line: memory, compilers, ranks that are gone."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator

from dist_adv.errors import GOES_ON, LostRank, RankFailure


@contextmanager
def plain_failures(accelerator: Accelerator, key: str, batch_size: int) -> Iterator[None]:
    """Say in one line what goes wrong beneath us: memory, and ranks that are gone.

    Raises RankFailure where this process has no memory left, naming `key` and half of
    `batch_size`; LostRank where another process has left.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(rank, ranks, key, batch_size, error) from error
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in ("not enough memory", "can't allocate memory")):
            raise _out_of_memory(rank, ranks, key, batch_size, error) from error
        if "can't start new thread" in text:
            raise RankFailure(
                f"rank {rank} of {ranks} may not start another thread; raise ulimit -u, or lower "
                f"data.workers and train.threads"
            ) from error
        signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
        if isinstance(error, dist.DistError) or any(sign in text for sign in signs):
            raise LostRank(
                f"rank {rank} of {ranks} lost another rank ({reason(error)}); the launcher says "
                f"which one; {GOES_ON}"
            ) from error
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise RankFailure(
                f"train.compile: torch.compile failed on rank {rank} of {ranks} "
                f"({reason(error)}); set train.compile=none, or install a C++ compiler"
            ) from error
        raise


def _out_of_memory(
    rank: int, ranks: int, key: str, batch_size: int, error: BaseException
) -> RankFailure:
    return RankFailure(
        f"rank {rank} of {ranks} has no memory left ({reason(error)}); try {key}="
        f"{max(1, batch_size // 2)} instead of {batch_size}, a narrower model or more ranks"
    )


def reason(error: BaseException) -> str:
    """Return the first sentence of torch's message, without the place in its source."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^]]*\] *(err == 0\. )?", "", lines[0]).split(". ")[0].rstrip(".")
