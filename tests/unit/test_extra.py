"""Generated images beside the real ones: which, how many, the same at any number of ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cases import make_images
from dist_adv.config import parse_config
from dist_adv.data import Dataset, Loader
from dist_adv.data.datasets import DataOptions, ExtraOptions, of_tensors
from dist_adv.data.extra import with_extra
from dist_adv.errors import UserError
from dist_adv.packing import How, pack
from dist_adv.training.run import train_run

REAL, MANY, SIZE = 41, 60, 8


def real() -> Dataset:
    """Images that are their number, 0 to 40; three classes."""
    images = torch.arange(REAL, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)
    return of_tensors("numbers", images.clone(), torch.arange(REAL) % 3)


def arrays() -> dict[str, np.ndarray]:
    """Images that are their number and 100."""
    images = np.broadcast_to(
        np.arange(100, 100 + MANY, dtype=np.uint8)[:, None, None, None], (MANY, SIZE, SIZE, 3)
    )
    return {"image": np.ascontiguousarray(images), "label": np.arange(MANY) % 3}


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "1m.npz", **arrays())
    return tmp_path / "1m.npz"


def mixed(path: Path, fraction: float = 0.7, dataset: Dataset | None = None) -> Dataset:
    extra = ExtraOptions(path=str(path), fraction=fraction)
    return with_extra(dataset or real(), DataOptions(extra=extra))


def loader(dataset: Dataset, rank: int = 0, ranks: int = 1, batch_size: int = 10) -> Loader:
    return Loader(dataset, batch_size, 3, torch.device("cpu"), False, rank=rank, world_size=ranks)


def numbers(batch: Any) -> list[int]:
    return (batch.x[:, 0, 0, 0] * 255).round().int().tolist()


def test_batches_are_mixed_as_asked(npz):
    """As many as real images make, all full; these come once, the others with replacement."""
    batches = list(loader(mixed(npz)).epoch(1))
    assert [len(batch.y) for batch in batches] == [10] * 5
    found = [numbers(batch) for batch in batches]
    assert all(max(each[:3]) < REAL and min(each[3:]) >= 100 for each in found)
    ours = [number for each in found for number in each[:3]]
    assert len(set(ours)) == 15
    theirs = [number for each in found for number in each[3:]]
    assert 20 < len(set(theirs)) < 35  # of 60, 35 times
    for batch, each in zip(batches, found, strict=True):
        assert [n % 3 if n < REAL else (n - 100) % 3 for n in each] == batch.y.tolist()
        assert batch.samples.tolist() == [n if n < REAL else n - 100 + REAL for n in each]
    again = [numbers(batch) for batch in loader(mixed(npz)).epoch(1)]
    later = [numbers(batch) for batch in loader(mixed(npz)).epoch(1, start=3)]
    assert found == again
    assert found[3:] == later
    other = [numbers(batch) for batch in loader(mixed(npz)).epoch(2)]
    assert all(one[3:] != two[3:] for one, two in zip(found, other, strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
def test_they_are_the_same_at_any_number_of_ranks(npz, ranks):
    alone = list(loader(mixed(npz)).epoch(0))
    for rank in range(ranks):
        for whole, share in zip(alone, loader(mixed(npz), rank, ranks).epoch(0), strict=True):
            assert whole.x[rank::ranks].equal(share.x)
            assert whole.keys[rank::ranks].equal(share.keys)
            assert share.weight == len(share.x) * ranks / 10


def test_real_images_come_again_where_a_batch_is_mostly_of_them(npz):
    """Of 41 images five batches of nine want 45."""
    batches = list(loader(mixed(npz, 0.1)).epoch(0))
    ours = [number for batch in batches for number in numbers(batch)[:9]]
    assert (len(ours), len(set(ours))) == (45, REAL)


def test_they_are_cropped_and_turned_as_real_ones_are(npz):
    dataset = replace(mixed(npz), crop_padding=2, flip=True)
    batch = next(iter(Loader(dataset, 10, 3, torch.device("cpu")).epoch(0)))
    corners = batch.x[3:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).any()
    assert (batch.x[3:, 0, 4, 4] * 255).min() >= 100


def test_a_pack_of_pixels_does_as_well(npz, tmp_path):
    folder = tmp_path / "folder"
    make_images(folder, train=20, test=2)
    pack(folder / "train", tmp_path / "packed" / "train", How(raw=True))
    for path in (tmp_path / "packed", tmp_path / "packed" / "train"):
        assert len(mixed(path).extra.labels) == 60
    with pytest.raises(UserError, match="no pack of pixels; make one with `dist-adv pack --raw`"):
        mixed(folder)


def test_images_held_out_are_real(npz):
    rest, held = mixed(npz).hold_out(5)
    assert rest.extra
    assert held.extra is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image": np.zeros((60, 9, 8, 3), np.uint8)}, r"images are uint8 \(60, 9, 8, 3\) and num"),
        ({"image": np.zeros((60, 8, 8, 3))}, r"images are float64"),
        ({"image": np.asfortranarray(np.zeros((60, 8, 8, 3), np.uint8))}, "Fortran's order"),
        ({"label": np.arange(59)}, r"labels are int64 \(59,\) of 60 images"),
        ({"label": np.arange(60) % 4}, "labels go from 0 to 3 and numbers has 3 classes"),
        ({"label": np.zeros(60)}, "labels are float64"),
        ({"label": None}, "has image.npy; image.npy and label.npy are needed"),
        ({"label": np.array([{}] * 60, object)}, "Object arrays cannot be loaded"),
    ],
)
def test_files_that_do_not_go_with_the_real_images(change, says, tmp_path):
    both = {name: array for name, array in (arrays() | change).items() if array is not None}
    np.savez(tmp_path / "x.npz", **both)
    with pytest.raises(UserError, match=f"^data.extra.path: .*x.npz: .*{says}"):
        mixed(tmp_path / "x.npz")


def test_files_that_are_none(npz, tmp_path):
    np.savez_compressed(tmp_path / "small.npz", **arrays())
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "half.npz").write_bytes(npz.read_bytes()[:3000])
    for name, says in (
        ("small.npz", "is compressed and cannot be mapped; write it again with np.savez"),
        ("text.npz", "File is not a zip file"),
        ("half.npz", "File is not a zip file"),
        ("none.npz", "No such file"),
    ):
        with pytest.raises(UserError, match=f"^data.extra.path: .*{name}: {says}"):
            mixed(tmp_path / name)
    with pytest.raises(UserError, match="is 0 images; a batch needs real and generated ones"):
        loader(mixed(npz, 0.01))
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            ExtraOptions(path="x", fraction=fraction)


def settings(images: Path, npz: Path, method: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": {"guard": "none", **method},
        "model": {"name": "wide_resnet", "depth": 8, "widen": 1, "width": 4},
        "data": {"name": "imagefolder", "root": str(images), "extra": {"path": str(npz)}},
        "train": {"epochs": 2, "batch_size": 10, "precision": "fp32", "threads": 1},
        "eval": {"attacks": ["natural"], "every": 0},
        "track": {"wandb": {"mode": "disabled"}},
    }


def test_a_run_goes_on_with_the_same_file_alone(images, npz, tmp_path):
    """Bit for bit in mid-epoch. Another file is another experiment."""
    tree = settings(images, npz, {"name": "trades", "steps": 2})
    tree["train"] |= {"save_steps": 4, "keep": 10}
    config = parse_config(tree, "extra")
    train_run(config, tmp_path / "whole", "none")
    first = tmp_path / "whole" / "checkpoints" / "step-000000004"
    train_run(config, tmp_path / "again", str(first))
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(whole[name].equal(again[name]) for name in whole)
    (tmp_path / "whole" / "model.safetensors").unlink()
    for path in sorted((tmp_path / "whole" / "checkpoints").iterdir())[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    np.savez(npz, **(arrays() | {"image": arrays()["image"] + 1}))
    with pytest.raises(UserError, match="extra: the same number of images, but other contents"):
        train_run(config, tmp_path / "whole", "auto")


def test_a_method_with_a_row_an_image_is_refused(images, npz, tmp_path):
    tree = settings(images, npz, {"name": "consistency", "start": "prior"})
    with pytest.raises(
        UserError, match=r"data\.extra: consistency keeps a row of every training im"
    ):
        train_run(parse_config(tree, "rows"), tmp_path / "run", "none")
