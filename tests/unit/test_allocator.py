"""A CPU's memory is taken from the system once, not at every step."""

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
from dist_adv import allocator
if "kept" in sys.argv:
    allocator.allow_large_pages()
import torch
if "kept" in sys.argv:
    allocator.keep_freed_memory()
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    forward = [torch.ones(1 << 20) for _ in range(64)]  # 4 MB each
    while forward:
        forward.pop()
for _ in range(3):
    step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


def faults(*arguments: str, **variables: str) -> int:
    """Pages that the system has to clear for four steps of 256 MB."""
    env = {name: value for name, value in os.environ.items() if "MALLOC" not in name} | variables
    command = [sys.executable, "-c", STEPS, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's allocator")
def test_freed_memory_is_kept() -> None:
    pages = 4 * (256 << 20) // 4096
    assert faults("kept") < pages / 100
    # As it would be, which is also how somebody's own settings leave it.
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="131072") > pages / 4
