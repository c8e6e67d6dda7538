"""Memory of a CPU that is used again and again: kept by the process, in large pages.

A training step takes a gigabyte of activations and gives it back. glibc returns freed memory to
the system, which clears each page of 4 kB anew when it is touched again: on two cores of a virtual
machine a quarter of a step (benchmarks/results/2026-11-28-cpu.md).
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MOST = 32 << 20
"""The largest blocks that glibc (2.36) can be told to cut from its heap."""


def allow_large_pages() -> None:
    """Let torch ask for pages of 2 MB for large tensors; before torch is imported.

    A variable of torch's (c10/core/impl/alloc_cpu.cpp), which is left as it is where it is set.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let this process keep what it frees; nothing where its C library is not glibc.

    Whoever has told glibc otherwise by its variables is obeyed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    told = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
    if mallopt is None or told & os.environ.keys():
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_MMAP_THRESHOLD, _MOST)
