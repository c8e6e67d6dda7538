"""Processes and precision: the Accelerator, what ranks wait for, exact reductions."""

import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    gather_object,
    str_to_bool,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_adv import engines, launched, stopping
from dist_adv.data import Dataset, Fingerprints, what_changed
from dist_adv.engines import TrainNet
from dist_adv.errors import GOES_ON, LostRank, RankFailure, UserError

log = logging.getLogger("dist_adv")
T = TypeVar("T")


def start(
    precision: str = "fp32", threads: int | None = None, deterministic: bool = True
) -> Accelerator:
    """The Accelerator of this process, on CUDA where there is any, else on the CPU with gloo.

    fp32 is IEEE's from here on, and cuDNN's algorithms are `deterministic` or the fastest.

    Raises UserError for variables of a launcher that are left over (`launched.check`) and those of
    Accelerate's that would change training (`engines.check_environment`), for a precision that the
    device does not have, for settings of an engine that are not to be had (`engines.start`), for a
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
    # Buffers: BatchNorm's statistics stay each rank's own while training and are averaged in
    # `snapshot`. Broadcasting rank 0's at every forward would cost a collective and lose them.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # torch 2.14 renames the option, Accelerate does not pass the new name yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    mixed = resolve_precision(precision, cpu)
    with _meeting():
        accelerator = engines.start(cpu, mixed) or Accelerator(
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


# Each lets a library compute fp32 with shorter factors, whatever torch is told; and its values
# that do not.
_SHORTER_FP32 = {
    "NVIDIA_TF32_OVERRIDE": ("", "0"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "DNNL_DEFAULT_FPMATH_MODE": ("", "STRICT"),
}


def check_fp32_variables() -> None:
    """Raises UserError for a variable by which fp32 would silently be less."""
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


def say_what_is_not_heeded(accelerator: Accelerator) -> None:
    """Warn of a precision in `accelerate config`, which every launch hands on: it is ours to set.

    Other variables of Accelerate's are used, harmless or refused (`engines.check_environment`).
    """
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", accelerator.mixed_precision):
        log.warning("ACCELERATE_MIXED_PRECISION=%s is not heeded: see train.precision", wanted)


@contextmanager
def _meeting() -> Iterator[None]:
    """The ranks meet at MASTER_ADDR and MASTER_PORT, or say in one line why they do not."""
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
            f"{place}:{port} ({_reason(error)}); see MASTER_ADDR, MASTER_PORT and the firewall"
        ) from error


def check_same_start(accelerator: Accelerator, about: Mapping[str, Any]) -> None:
    """Raises UserError on every rank where one was started with something else than rank 0."""
    mine = (socket.gethostname(), dict(about))
    everyone = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    first, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        different = [
            f"{key}: {found.get(key)} there, {expected.get(key)} on rank 0"
            for key in sorted(expected.keys() | found.keys())
            if found.get(key) != expected.get(key)
        ]
        if different:
            raise UserError(
                f"rank {rank} on {host} and rank 0 on {first} were not started alike "
                f"({'; '.join(different)}); give every rank the same command, code and files"
            )


def check_same_images(accelerator: Accelerator, prints: Fingerprints) -> None:
    """Raises UserError on every rank where one reads other images than rank 0."""
    mine = (socket.gethostname(), prints)
    everyone = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    first, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        changed = what_changed(expected, found)
        if changed:
            raise UserError(
                f"data.root: rank {rank} on {host} has other images than rank 0 on {first} "
                f"({'; '.join(changed)}); copy the folder (or that of DIST_ADV_DATA) once more"
            )


def cores() -> int:
    """Those that this process may use."""
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


def native_bf16() -> bool:
    """Has this CPU instructions for it?"""
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def synchronised(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """BatchNorm with the statistics of the global batch, where there are several ranks.

    Raises UserError off GPUs, where torch has no such layer.
    """
    if accelerator.num_processes == 1:
        return model
    if accelerator.device.type == "cpu":
        raise UserError(
            "train.sync_batchnorm: torch's SyncBatchNorm needs GPUs; on CPUs use model.norm=group"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def compile_network(model: nn.Module, choice: Literal["none", "default", "max"]) -> None:
    """Let torch.compile fuse the layers, in place: parameters keep their names.

    Every shape has code of its own, because code for any shape is slower: the short last batch is
    compiled too. Frozen and trained forwards are two graphs; the frozen one's backward computes
    no weight gradients. DDP waits for the whole backward, so that its all-reduce no longer
    overlaps with it: the price of one graph.
    """
    if choice != "none":
        # On, it cuts the graph where DDP's buckets end (PreActResNet18: three graphs), compiles
        # each, and lets their all-reduces overlap with the rest.
        torch._dynamo.config.optimize_ddp = False
        model.compile(dynamic=False, mode="max-autotune" if choice == "max" else None)


def settle(accelerator: Accelerator, net: TrainNet, data: Dataset) -> None:
    """Let DDP arrange its gradients for good, by a forward and backward that change nothing.

    DDP regroups its buckets after the first backward pass, and with three ranks or more the
    order of summation depends on them: a resumed run would take its first step in another order
    than the uninterrupted run and differ from it in the last bits.
    """
    if not isinstance(net.prepared, DistributedDataParallel):
        return
    before = {name: buffer.clone() for name, buffer in net.bare.named_buffers()}
    blank = torch.zeros(2, *data.images.shape[1:], device=accelerator.device)
    with torch.compiler.set_stance("force_eager"):  # two images are not worth compiling for
        for _ in range(2):  # the second forward is when it happens
            net(blank.to(memory_format=torch.channels_last)).sum().backward()
    for parameter in net.bare.parameters():
        parameter.grad = None
    for name, buffer in net.bare.named_buffers():
        buffer.copy_(before[name])


@contextmanager
def plain_failures(accelerator: Accelerator, key: str, batch_size: int) -> Iterator[None]:
    """What goes wrong beneath us, in one line: memory, and ranks that are gone.

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
                f"rank {rank} of {ranks} lost another rank ({_reason(error)}); the launcher says "
                f"which one; {GOES_ON}"
            ) from error
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise RankFailure(
                f"train.compile: torch.compile failed on rank {rank} of {ranks} "
                f"({_reason(error)}); set train.compile=none, or install a C++ compiler"
            ) from error
        raise


def _out_of_memory(
    rank: int, ranks: int, key: str, batch_size: int, error: BaseException
) -> RankFailure:
    return RankFailure(
        f"rank {rank} of {ranks} has no memory left ({_reason(error)}); try {key}="
        f"{max(1, batch_size // 2)} instead of {batch_size}, a narrower model or more ranks"
    )


def _reason(error: BaseException) -> str:
    """The first sentence of torch's message, without the place in its source."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^]]*\] *(err == 0\. )?", "", lines[0]).split(". ")[0].rstrip(".")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """The main process's result on every rank; what it raises is raised on every rank."""
    outcome: list[T | Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except Exception as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def on_every(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """This rank's result; a UserError of any rank is raised on all, so that none is waited for."""
    result, mistake = None, None
    try:
        result = work()
    except UserError as error:
        mistake = error
    mistakes = gather_object([mistake]) if accelerator.num_processes > 1 else [mistake]
    for each in mistakes:
        if each is not None:
            raise each
    return result  # type: ignore[return-value]


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """One process a node goes first; unlike Accelerate's own, also where it fails."""
    if not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_local_main_process:
            accelerator.wait_for_everyone()


def total(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The sum over ranks, of counts or of sums of losses."""
    return accelerator.reduce(value, reduction="sum")


@torch.no_grad()
def snapshot(accelerator: Accelerator, net: TrainNet, into: nn.Module) -> None:
    """Copy the weights into a plain fp32 model, BatchNorm's running statistics averaged.

    The model in training is left alone, so that evaluating or saving at any moment does not
    change what comes after it; and what is evaluated is what is saved.
    """
    state = net.state_dict()
    names = [name for name in state if name.endswith(("running_mean", "running_var"))]
    if accelerator.num_processes > 1 and names:
        flat = torch.cat([state[name].flatten() for name in names])
        mean = accelerator.reduce(flat, reduction="mean")
        parts = mean.split([state[name].numel() for name in names])
        state |= {name: part.view_as(state[name]) for name, part in zip(names, parts, strict=True)}
    into.load_state_dict(state)
