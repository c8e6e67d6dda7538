"""What all ranks do together: compare how they were started, wait for one, sum."""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from dist_adv.config import Config, Judged, flatten
from dist_adv.data import Fingerprints, place_key, what_changed
from dist_adv.errors import UserError
from dist_adv.runs.environment import code_version

T = TypeVar("T")


def check_same_start(accelerator: Accelerator, about: Mapping[str, Any]) -> None:
    """Raise UserError on every rank where one was started with something else than rank 0."""
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


def check_started_alike(
    config: Config | Judged, accelerator: Accelerator, arguments: Mapping[str, Any]
) -> None:
    """Raise UserError where a rank has another command, configuration, code or torch than rank 0.

    The images may lie elsewhere on each machine.
    """
    settings = flatten(config.model_dump()) | {"train.precision": accelerator.mixed_precision}
    del settings["data.root"]
    settings.pop("data.path", None)
    about = {**settings, **arguments, "code": code_version(), "torch": torch.__version__}
    about |= {f"source of {name}": source for name, source in config.sources().items()}
    check_same_start(accelerator, about)


def check_same_images(accelerator: Accelerator, prints: Fingerprints, data: str) -> None:
    """Raise UserError on every rank where one reads other images than rank 0.

    data: the name of the data set.
    """
    mine = (socket.gethostname(), prints)
    everyone = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    first, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        changed = what_changed(expected, found)
        if changed:
            raise UserError(
                f"{place_key(data)}: rank {rank} on {host} has other images than rank 0 on {first} "
                f"({'; '.join(changed)}); give every rank the same: copy the folder (or that of "
                f"DIST_ADV_DATA) once more"
            )


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return the main process's result on every rank; what it raises is raised on every rank."""
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
    """Return this rank's result; raise a UserError of any rank on all, so that none waits."""
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


def sum_over_ranks(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Return the sum over ranks, of counts or of sums of losses."""
    return accelerator.reduce(value, reduction="sum")


def share_evenly(accelerator: Accelerator, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return this rank's part of the rows of all ranks, alike many each. Every rank calls this.

    rows: tensors (n, ...) of this rank, with as many rows n as it has, which may be none.
    """
    if accelerator.num_processes == 1:
        return rows
    mine = torch.tensor([len(rows[0])], device=accelerator.device)
    counts = accelerator.gather(mine).tolist()
    if not max(counts):
        return rows  # Accelerate's gather over NCCL cannot reshape tensors without elements
    shared = []
    for each in rows:
        padded = each.new_zeros(max(counts), *each.shape[1:])
        padded[: len(each)] = each
        everyone = accelerator.gather(padded[None])
        whole = torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])
        shared.append(whole[accelerator.process_index :: accelerator.num_processes])
    return shared


def mean_statistics(accelerator: Accelerator, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's state with BatchNorm's running statistics averaged over ranks."""
    names = [name for name in state if name.endswith(("running_mean", "running_var"))]
    if accelerator.num_processes == 1 or not names:
        return state
    flat = torch.cat([state[name].flatten() for name in names])
    mean = accelerator.reduce(flat, reduction="mean")
    parts = mean.split([state[name].numel() for name in names])
    means = {name: part.view_as(state[name]) for name, part in zip(names, parts, strict=True)}
    return state | means
