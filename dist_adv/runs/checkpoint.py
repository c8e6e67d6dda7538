"""Checkpoints: safetensors and JSON only, complete or absent, checked before they are used.

A checkpoint is a folder `step-NNNNNNNNN/` whose `manifest.json` holds the size and SHA-256 of
every file. It is written under a temporary name, synced, and renamed: a reader never sees half
of one, and an interrupted write leaves the earlier checkpoints as they were.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from dist_adv.errors import RunFailure, UserError

FORMAT = 1
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Groups of tensors (a file each) and a JSON-able state; `about` goes into every file."""

    groups: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    about: Mapping[str, str] = field(default_factory=dict)


def save(
    folder: Path, step: int, checkpoint: Checkpoint, keep: int, spare: Collection[int] = ()
) -> Path:
    """Write `folder/step-NNNNNNNNN` whole or not at all; then delete older ones.

    The newest `keep` stay, and those of the steps in `spare`.

    Raises RunFailure where the disk refuses (full, read-only); nothing partial stays behind.
    """
    target = _path(folder, step)
    partial = folder / f".partial-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, tensors in checkpoint.groups.items():
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            data = serialize(plain, dict(checkpoint.about) or None)
            (partial / f"{name}.safetensors").write_bytes(data)
        _write_json(partial / _STATE, {"format": FORMAT, **checkpoint.state})
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        _write_json(partial / "manifest.json", {"files": files})
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        _discard(target)  # a damaged one of the same step: never merge the two
        partial.rename(target)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailure(
            f"{target}: could not be written ({error}); earlier checkpoints are intact"
        ) from error
    spared = {_path(folder, each) for each in spare}
    # Newer ones are damaged, or the run would have gone on from them: they do not count.
    for old in [path for path in _all(folder) if path.name <= target.name][keep:]:
        if old not in spared:
            _discard(old)
    return target


class Writer:
    """Saves in the background, one at a time. What goes wrong is raised by a later call.

    Each in a thread of its own that ends with it: OpenMP gives a thread that computes workers of
    its own, and while they live it counts more threads than cores and lets none wait busily. On
    two cores a training step then took 1.35 times as long, up to the end of the run.
    """

    def __init__(self) -> None:
        self.pending: Future[Path] | None = None

    def save(self, *arguments: Any) -> None:
        """`save` of this module, of tensors that nobody changes any more."""
        self.wait()
        thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending = thread.submit(save, *arguments)
        thread.shutdown(wait=False)  # ends once the checkpoint is complete

    def check(self) -> None:
        """Raise what went wrong, without waiting."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()


def remove_leftovers(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote. Nobody else may be writing."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest.

    Raises UserError for one that is missing, incomplete or damaged.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = manifest["files"]
        for name, expected in files.items():
            if _fingerprint(path / name) != expected:
                raise UserError(f"{path}: {name} is damaged (its size or SHA-256 differs)")
        tensors = [path / name for name in files if name != _STATE]
        groups = {file.stem: load_file(file) for file in tensors}
        if _STATE not in files:
            raise UserError(f"{path}: its manifest has no {_STATE}")
        state = json.loads((path / _STATE).read_text())
        found = state["format"]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise UserError(f"{path}: no complete checkpoint ({error})") from None
    if found != FORMAT:
        raise UserError(f"{path}: format {found} is not {FORMAT}; use its version")
    return Checkpoint(groups, state)


def load_newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
    """Return the newest good checkpoint, and say which are passed over; None if there is none.

    Raises UserError where checkpoints exist but none is good: never a silent fresh start.
    """
    candidates = _all(folder)
    for path in candidates:
        try:
            return path, load(path)
        except UserError as error:
            say(f"passed over: {error}")
    if candidates:
        raise UserError(
            f"{folder}: none of its {len(candidates)} checkpoints is good; "
            f"start in another folder with --run-dir, or restore one"
        )
    return None


def newest_state(folder: Path) -> Mapping[str, Any]:
    """Return the state of the newest checkpoint with a readable one; its tensors stay unread."""
    for path in _all(folder):
        try:
            state = json.loads((path / _STATE).read_text())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(state, dict):
            return state
    return {}


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def _discard(path: Path) -> None:
    """Rename, then delete: half of one that a killed process left is not taken for a checkpoint."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f".partial-old-{path.name}")), ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    """Newest first; a copy that somebody has made beside them, step-...-good, is none."""
    found = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, reverse=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
