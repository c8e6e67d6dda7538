"""The start of a process: its Accelerator, precision and threads."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, str_to_bool

from dist_adv.allocator import keep_freed_memory
from dist_adv.distributed import engines, launched, stopping
from dist_adv.distributed.failures import reason
from dist_adv.errors import RankFailure, UserError

log = logging.getLogger("dist_adv")


def start_accelerator(
    precision: str = "fp32", threads: int | None = None, deterministic: bool = True
) -> Accelerator:
    """Return this process's Accelerator, on CUDA where there is any, else on the CPU with gloo.

    fp32 is IEEE's from here on, and cuDNN's algorithms are `deterministic` or the fastest.

    Raises UserError for variables of a launcher that are left over (`launched.check`) and those of
    Accelerate's that would change training (`engines.check_environment`), for a precision that the
    device does not have, for settings of an engine that are not to be had (`start_engine`), for a
    port that is in use, and where the launcher's processes do not see each other (each would train
    alone and overwrite the others' files). Raises RankFailure where rank 0 cannot be reached;
    Preempted where this process was asked to stop already.
    """
    check_fp32_variables()
    launched.check()
    engines.check_environment()
    forced = os.environ.get("ACCELERATE_USE_CPU", "false")
    cpu = not torch.cuda.is_available() or str_to_bool(forced) == 1
    if cpu:
        torch.set_num_threads(threads or threads_per_rank())
        keep_freed_memory()
    # Buffers: BatchNorm's statistics stay each rank's own while training and are averaged in
    # `snapshot`. Broadcasting rank 0's at every forward would cost a collective and lose them.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # torch 2.14 renames the option, Accelerate does not pass the new name yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    mixed = resolve_precision(precision, cpu)
    with _meeting():
        accelerator = engines.start_engine(cpu, mixed) or Accelerator(
            cpu=cpu,
            mixed_precision="no" if mixed == "fp32" else mixed,
            kwargs_handlers=[ddp],
        )
    set_numerics(deterministic)
    if accelerator.num_processes != launched.ranks():
        raise UserError(
            f"the launcher started {launched.ranks()} processes but this one sees "
            f"{accelerator.num_processes}; without GPUs use ACCELERATE_USE_CPU=true "
            f"accelerate launch --multi_gpu --num_processes N, or torchrun --nproc-per-node N"
        )
    return accelerator


@contextmanager
def as_it_was() -> Iterator[None]:
    """Start an Accelerator within, in a process that may have one, and leave no trace of it.

    All Accelerators of a process share the state of the first, its precision too, and lose it
    together: the one of before has its own again afterwards, as do fp32, cuDNN, the threads and
    torch's generators.
    """
    state, matmul = AcceleratorState._shared_state, torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before, threads = dict(state), torch.get_num_threads()
    switches: list[tuple[Any, str, Any]] = [
        (cudnn, name, getattr(cudnn, name)) for name in ("deterministic", "benchmark")
    ]
    for older, newer in ((cudnn, (cudnn.conv, cudnn.rnn)), (matmul, (matmul,))):
        try:
            switches.append((older, "allow_tf32", older.allow_tf32))
        except RuntimeError:  # the program has set the newer switches
            switches += [(each, "fp32_precision", each.fp32_precision) for each in newer]
    state.clear()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        state.clear()
        state.update(before)
        torch.set_num_threads(threads)
        for owner, name, value in switches:
            setattr(owner, name, value)


# Each lets a library compute fp32 with shorter factors, whatever torch is told; and its values
# that do not.
_SHORTER_FP32 = {
    "NVIDIA_TF32_OVERRIDE": ("", "0"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "DNNL_DEFAULT_FPMATH_MODE": ("", "STRICT"),
}


def check_fp32_variables() -> None:
    """Raise UserError for a variable by which fp32 would silently be less."""
    for name, harmless in _SHORTER_FP32.items():
        if (value := os.environ.get(name, "")).upper() not in harmless:
            raise UserError(
                f"{name}: {value!r} in the environment rounds the factors of fp32 products to "
                f"fewer bits; unset it"
            )


def set_numerics(deterministic: bool) -> None:
    """Make fp32 IEEE's on GPUs, and cuDNN's choice of algorithms repeatable or the fastest.

    torch leaves cuDNN's convolutions on TF32 (10 bits of mantissa instead of 23), and Accelerate
    turns TF32 on for matrix products where it compiles: hence after it. The older switches, as
    inductor reads them, and torch raises where they are read after the newer ones were set (2.14,
    torch/_inductor/kernel/conv.py:1137).
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = deterministic
    # Which algorithm is fastest is found out by timing, and may turn out otherwise each time.
    torch.backends.cudnn.benchmark = not deterministic


def warn_of_unused_precision(accelerator: Accelerator) -> None:
    """Warn of a precision in `accelerate config`, which every launch hands on: it is ours to set.

    Other variables of Accelerate's are used, harmless or refused (`engines.check_environment`).
    """
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", accelerator.mixed_precision):
        log.warning("ACCELERATE_MIXED_PRECISION=%s is not heeded: see train.precision", wanted)


@contextmanager
def _meeting() -> Iterator[None]:
    """Let the ranks meet at MASTER_ADDR and MASTER_PORT, or say in one line why they do not."""
    try:
        with stopping.leaving_at_once():
            yield
    except NotImplementedError as error:  # RTX 4000s with an old driver: it says what to set
        raise UserError(str(error)) from error
    except dist.DistError as error:
        port, place = os.environ.get("MASTER_PORT"), os.environ.get("MASTER_ADDR")
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT: {port} is in use on {socket.gethostname()}; set another one, below "
                f"32768 and the same for every rank"
            ) from error
        raise RankFailure(
            f"rank {os.environ.get('RANK')} on {socket.gethostname()} did not meet the others at "
            f"{place}:{port} ({reason(error)}); see MASTER_ADDR, MASTER_PORT and the firewall"
        ) from error


def cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def threads_per_rank() -> int:
    """Ranks times threads never exceed the cores: two threads too many slow a run tenfold."""
    share = max(1, cores() // launched.ranks_here())
    # A list such as `2,1` is for nested levels; the first is ours.
    wanted = (os.environ.get("OMP_NUM_THREADS") or str(share)).split(",")[0]
    if not wanted.isdecimal() or wanted == "0":
        raise UserError(f"OMP_NUM_THREADS: {wanted!r} in the environment is no number of threads")
    return min(share, int(wanted))


def resolve_precision(wanted: str, cpu: bool) -> str:
    """`fp32`, `bf16` or `fp16` for `auto`: what the device computes fast without emulation.

    bf16 on NVIDIA GPUs from Ampere on and on CPUs with bf16 instructions; fp16 with loss scaling
    on older GPUs (Turing emulates bf16); else fp32.
    """
    if cpu:
        if wanted == "fp16":
            raise UserError("train.precision: fp16 needs a GPU; use bf16, fp32 or auto here")
        if wanted == "auto":
            return "bf16" if native_bf16() else "fp32"
        return wanted
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    if wanted == "auto":
        return "bf16" if ampere else "fp16"
    if wanted == "bf16" and not ampere:
        raise UserError(
            f"train.precision: {torch.cuda.get_device_name()} has no native bf16; use fp16 or auto"
        )
    return wanted


def precision_of(accelerator: Accelerator) -> str:
    """Return fp32, bf16 or fp16: Accelerate says `no` for the first."""
    return accelerator.mixed_precision.replace("no", "fp32")


def native_bf16() -> bool:
    """Tell whether this CPU has instructions for bf16."""
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
