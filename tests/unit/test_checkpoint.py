"""Checkpoints: whole or absent, checked before use, and never a silent fresh start."""

import hashlib
import json
import pickle
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dist_adv.errors import RunFailure, UserError
from dist_adv.runs.checkpoint import Checkpoint, Writer, load, load_newest, save

FILES = ["model.safetensors", "optimizer.safetensors", "method.safetensors"]
FILES += ["state.json", "manifest.json"]


def made_up(step: int) -> Checkpoint:
    """Tensors of several types and layouts, and a nested state."""
    draw = torch.Generator().manual_seed(step)
    weight = torch.randn(8, 4, 3, 3, generator=draw)
    return Checkpoint(
        {
            "model": {
                "weight": weight.to(memory_format=torch.channels_last),
                "half": weight.half(),
                "bf16": weight.bfloat16(),
                "count": torch.tensor(step),
                "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
            },
            "optimizer": {"0.momentum_buffer": weight[:, 1].permute(2, 1, 0)},
            "method": {},
        },
        {"clock": {"step": step, "seconds": 0.1}, "wandb_id": None, "config": {"eps": 8 / 255}},
    )


def same(one: Checkpoint, two: Checkpoint) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    return one.groups.keys() == two.groups.keys() and all(
        one.groups[group].keys() == two.groups[group].keys()
        and all(
            tensor.dtype == two.groups[group][name].dtype
            and tensor.shape == two.groups[group][name].shape
            and bits(tensor) == bits(two.groups[group][name])
            for name, tensor in one.groups[group].items()
        )
        for group in one.groups
    )


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def fingerprint(path: Path) -> dict:
    """A file's line in the manifest."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 5 and 12."""
    for step in (5, 12):
        save(tmp_path, step, made_up(step), keep=3)
    return tmp_path


def test_round_trip(tmp_path):
    path = save(tmp_path / "new" / "checkpoints", 7, made_up(7), keep=2)
    assert path.name == "step-000000007"
    assert names(path) == sorted(FILES)
    again = load(path)
    assert same(again, made_up(7))
    assert {key: again.state[key] for key in made_up(7).state} == made_up(7).state
    assert not same(again, made_up(8))


@pytest.mark.parametrize("keep", [1, 2, 3, 10])
def test_newest_are_kept(keep, tmp_path):
    for step in (3, 900, 1000, 20_000):
        save(tmp_path, step, made_up(step), keep)
    steps = [3, 900, 1000, 20_000][-keep:]
    assert names(tmp_path) == [f"step-{step:09d}" for step in steps]
    path, newest = load_newest(tmp_path, pytest.fail)
    assert path.name == "step-000020000"
    assert newest.state["clock"]["step"] == 20_000


def test_a_copy_beside_them_is_somebodys(tmp_path):
    save(tmp_path, 1, made_up(1), 1)
    (tmp_path / "step-000000001").rename(tmp_path / "step-000000001-good")
    for step in (2, 3):
        save(tmp_path, step, made_up(step), 1)
    assert names(tmp_path) == ["step-000000001-good", "step-000000003"]


def test_no_thread_lives_on_after_writing(tmp_path):
    """OpenMP would count its workers with those of training, and let none wait busily."""
    writer = Writer()
    writer.save(tmp_path, 7, made_up(7), 2)
    writer.wait()
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint"):
            thread.join(30)
            assert not thread.is_alive()
    assert same(load(tmp_path / "step-000000007"), made_up(7))


def test_no_checkpoint_is_no_error(tmp_path):
    assert load_newest(tmp_path / "absent", pytest.fail) is None
    assert load_newest(tmp_path, pytest.fail) is None


def flip(content: bytes, share: float) -> bytes:
    place = min(int(len(content) * share), len(content) - 1)
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def damage(path: Path, how, share: float) -> None:
    before = path.read_bytes()
    path.write_bytes(how(before, share))
    assert path.read_bytes() != before


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("how", [flip, cut])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_seen_and_the_earlier_one_used(file, how, share, two):
    """Wherever it is, and it is said aloud."""
    damage(two / "step-000000012" / file, how, share)
    said: list[str] = []
    path, earlier = load_newest(two, said.append)
    assert path.name == "step-000000005"
    assert same(earlier, made_up(5))
    assert len(said) == 1
    assert "step-000000012" in said[0]
    with pytest.raises(UserError, match="step-000000012"):
        load(two / "step-000000012")


@pytest.mark.parametrize("file", FILES)
def test_missing_file_is_seen(file, two):
    (two / "step-000000012" / file).unlink()
    said: list[str] = []
    path, _ = load_newest(two, said.append)
    assert path.name == "step-000000005"
    assert len(said) == 1


@pytest.mark.parametrize(
    "manifest",
    [
        *("[]", "{}", "null", "3", '{"files": []}', '{"files": 3}', '{"files": {}}'),
        *('{"files": {"x": 1}}', '{"files": {"../step-000000005/state.json": {}}}'),
    ],
)
def test_strange_manifest_is_no_checkpoint(manifest, two):
    (two / "step-000000012" / "manifest.json").write_text(manifest)
    path, _ = load_newest(two, lambda message: None)
    assert path.name == "step-000000005"


def test_file_that_no_manifest_knows_is_not_read(two):
    """Only what was written and checked comes back."""
    newest = two / "step-000000012"
    (newest / "stray.safetensors").write_bytes((newest / "model.safetensors").read_bytes())
    assert load(newest).groups.keys() == made_up(12).groups.keys()


def test_none_good_is_an_error(two):
    """Training from the beginning without a word would overwrite what can be repaired."""
    for path in two.iterdir():
        damage(path / "model.safetensors", cut, 0.5)
    said: list[str] = []
    with pytest.raises(UserError, match="none of its 2 checkpoints is good"):
        load_newest(two, said.append)
    assert len(said) == 2


def test_another_format_is_refused(two):
    state = two / "step-000000012" / "state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 2'))
    manifest = two / "step-000000012" / "manifest.json"
    sums = json.loads(manifest.read_text())["files"]
    manifest.write_text(json.dumps({"files": sums | {state.name: fingerprint(state)}}))
    with pytest.raises(UserError, match="format 2"):
        load(two / "step-000000012")


def test_interrupted_write_is_ignored_and_cleared_away(two):
    """What a killed process leaves: everything but the last rename."""
    (two / "step-000000012").rename(two / ".partial-step-000000012")
    path, _ = load_newest(two, pytest.fail)
    assert path.name == "step-000000005"
    (two / "step-000000005").rename(two / ".partial-step-000000005")
    assert load_newest(two, pytest.fail) is None
    (two / ".partial-step-000000005").rename(two / "step-000000005")
    save(two, 12, made_up(12), keep=3)
    assert names(two) == ["step-000000005", "step-000000012"]
    assert same(load(two / "step-000000012"), made_up(12))


def test_damaged_one_of_the_same_step_is_replaced(two):
    damage(two / "step-000000012" / "model.safetensors", flip, 0.5)
    (two / "step-000000012" / "stray.safetensors").touch()
    save(two, 12, made_up(12), keep=3)
    assert names(two / "step-000000012") == sorted(FILES)
    assert same(load(two / "step-000000012"), made_up(12))


@contextmanager
def files_of_at_most(n: int) -> Iterator[None]:
    """The system refuses more than n bytes in a file, in the midst of a write, as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 500, -1])
def test_disk_that_refuses_leaves_the_earlier_ones(room, two):
    """Whichever file it refuses (-1: only the last byte of the largest), nothing else changes."""
    largest = max(path.stat().st_size for path in (two / "step-000000012").iterdir())
    with (
        files_of_at_most(room if room >= 0 else largest - 1),
        pytest.raises(RunFailure, match="could not be written"),
    ):
        save(two, 20, made_up(20), keep=1)
    assert names(two) == ["step-000000005", "step-000000012"]
    assert same(load(two / "step-000000012"), made_up(12))


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFailure, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1, made_up(1), keep=1)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.write_text, (self.canary, "executed")


@pytest.mark.parametrize("protocol", [0, 5, "torch"])
def test_pickle_is_never_executed(protocol, two, tmp_path):
    """Not even one that the manifest vouches for."""
    newest, canary = two / "step-000000012", tmp_path / "canary"
    file = newest / "model.safetensors"
    if protocol == "torch":
        torch.save(Payload(canary), file)
    else:
        file.write_bytes(pickle.dumps(Payload(canary), protocol))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][file.name] = fingerprint(file)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    path, _ = load_newest(two, lambda message: None)
    assert path.name == "step-000000005"
    assert not canary.exists()
