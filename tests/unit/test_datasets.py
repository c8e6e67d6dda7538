"""Data sets: what is read is what lies there, and what cannot be read is named.

CIFAR and SVHN cannot be shipped, so small files in their formats are made here and torchvision's
MD5 sums replaced by theirs; the readers and their checks are torchvision's own.
"""

import hashlib
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from dist_adv.config import parse_config
from dist_adv.data import DataOptions, Dataset, load_dataset
from dist_adv.data.files import Files
from dist_adv.errors import UserError
from dist_adv.training.trainer import Trainer

# --- digits --------------------------------------------------------------------------------------


def test_digits_are_split_in_two():
    """Disjoint and complete: every one of scikit-learn's digits is in exactly one split."""
    train, test = (load_dataset(DataOptions(name="digits"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    original = load_digits()
    expected = np.round(original.images * 255 / 16).astype(np.uint8)
    place = np.arange(1797) % 5 == 4
    for data, chosen in ((train, ~place), (test, place)):
        assert data.images.dtype == torch.uint8
        assert data.labels.dtype == torch.int64
        assert data.images.numpy()[:, 0].tolist() == expected[chosen].tolist()
        assert data.labels.tolist() == original.target[chosen].tolist()
        assert data.classes == [str(digit) for digit in range(10)]
        assert not data.flip


# --- statistics ----------------------------------------------------------------------------------


def test_statistics_are_numpy_s():
    noise = (
        np.random.default_rng(0).integers(0, 256, (20, 3, 5, 7))
        // np.array([1, 2, 3])[:, None, None]
    )
    images = torch.from_numpy(noise.astype(np.uint8))
    data = Dataset("imagefolder", images, torch.zeros(20, dtype=torch.int64), ["a"], 0, True)
    mean, std = data.statistics()
    assert mean == pytest.approx((noise / 255).mean((0, 2, 3)))
    assert std == pytest.approx((noise / 255).std((0, 2, 3)))


def test_statistics_of_one_colour_can_divide():
    images = torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)
    data = Dataset("imagefolder", images, torch.zeros(4, dtype=torch.int64), ["a"], 0, True)
    assert data.statistics() == ([pytest.approx(0.2)], [1 / 255])


# --- imagefolder ---------------------------------------------------------------------------------


def image(path: Path, size: tuple[int, int] = (8, 6), seed: int = 0) -> np.ndarray:
    """A picture of noise, `size` wide and high; its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, of three and two images a split."""
    for split in ("train", "test"):
        for number in range(5):
            label = "cat" if number < 3 else "dog"
            image(tmp_path / split / label / f"{number}.png", seed=number)
    return tmp_path


def read(root: Path, split: str = "train", **options) -> Dataset:
    return load_dataset(DataOptions(name="imagefolder", root=str(root), **options), split)


def test_imagefolder(folder):
    data = read(folder)
    assert data.images.shape == (5, 3, 6, 8)
    assert data.images.dtype == torch.uint8
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.labels.dtype == torch.int64
    assert data.classes == ["cat", "dog"]
    for number, ours in enumerate(data.images):
        pixels = image(folder / "other" / "x.png", seed=number)
        assert ours.permute(1, 2, 0).numpy().tolist() == pixels.tolist()


def test_root_is_the_option_else_the_environment(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("DIST_ADV_DATA", str(folder))
    assert len(load_dataset(DataOptions(name="imagefolder"), "test")) == 5
    with pytest.raises(UserError, match="elsewhere"):
        read(tmp_path / "elsewhere")


def test_grey_and_transparent_images_become_rgb(folder):
    grey = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    grey.save(folder / "train" / "cat" / "0.png")
    Image.new("RGBA", (8, 6), (10, 20, 30, 40)).save(folder / "train" / "cat" / "1.png")
    data = read(folder)
    assert data.images[0, 2].flatten().tolist() == list(range(48))
    assert data.images[1, :, 0, 0].tolist() == [217, 218, 220]  # 40 of 255 parts, over white


def empty_class(root: Path) -> None:
    for path in (root / "train" / "dog").iterdir():
        path.unlink()


def no_class(root: Path) -> None:
    (root / "train").rename(root / "kept")
    (root / "train").mkdir()


def no_split(root: Path) -> None:
    (root / "train").rename(root / "kept")


def file_for_a_folder(root: Path) -> None:
    no_split(root)
    (root / "train").touch()


def truncated(root: Path) -> None:
    path = root / "train" / "dog" / "4.png"
    path.write_bytes(path.read_bytes()[:-60])


def garbage(root: Path) -> None:
    (root / "train" / "dog" / "4.png").write_bytes(b"garbage" * 50)


def empty_file(root: Path) -> None:
    (root / "train" / "dog" / "4.png").write_bytes(b"")


def web_page(root: Path) -> None:
    (root / "train" / "dog" / "4.png").write_text("<!DOCTYPE html><html>404</html>")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_split, r"train is no folder; imagefolder needs train/<class>/"),
        (file_for_a_folder, r"train is no folder"),
        (no_class, "train: Couldn't find any class folder"),
        (empty_class, "no valid file for the classes dog"),
        (truncated, r"4\.png: not a readable image \(1 of 5 files"),
        (garbage, r"4\.png: not a readable image \(1 of 5 files"),
        (empty_file, r"4\.png: not a readable image \(1 of 5 files"),
        (web_page, r"4\.png: not a readable image \(1 of 5 files"),
    ],
)
def test_damaged_imagefolder(damage, said, folder):
    damage(folder)
    with pytest.raises(UserError, match=said) as raised:
        read(folder)
    assert str(raised.value).startswith("data.root: ")
    assert "\n" not in str(raised.value)


def test_images_of_several_sizes_need_a_size(folder):
    """Then the shorter side is resized and the middle kept."""
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(folder / "train" / "cat" / "0.png")
    with pytest.raises(UserError, match=r"^data\.size: .*2 different sizes; set data\.size"):
        read(folder)
    data = read(folder, size=5)
    assert data.images.shape == (5, 3, 5, 5)
    assert (data.images[0, :, :, 1:4] == 200).all()
    assert (data.images[0, :, :, [0, 4]] > 150).all(), "two thirds of the width are cut off"
    assert read(folder, size=16).images.shape == (5, 3, 16, 16)


def test_splits_of_other_classes(folder, accelerator):
    """Label 0 of one split would be label 1 of the other."""
    (folder / "test" / "cat").rename(folder / "test" / "zebra")
    tree = {
        "method": {"name": "natural"},
        "data": {"name": "imagefolder", "root": str(folder)},
        "train": {"batch_size": 5, "precision": "fp32"},
    }
    with pytest.raises(UserError, match=r"1 are in the train split alone \(cat\)"):
        Trainer(parse_config(tree, "here"), accelerator)


# --- CIFAR and SVHN ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def refused(monkeypatch):
    """No download: the network is not there."""
    asked: list[str] = []

    def refuse(request, *rest, **more):
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def batch(folder: Path, name: str, labels_key: str, n: int, classes: int) -> list[str]:
    """A file in CIFAR's format (rows of 3072 bytes, red first), as torchvision's tables list it."""
    draw = np.random.default_rng(len(name) + n)
    pixels = draw.integers(0, 256, (n, 3072), dtype=np.uint8)
    labels = draw.integers(0, classes, n).tolist()
    content = {"data": pixels, labels_key: labels, "batch_label": name}
    return written(folder / name, content)


def written(path: Path, content: dict) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """`cifar(name)` makes the set below the folder that it gives."""

    def make(name: str) -> Path:
        kind = getattr(torchvision.datasets, name.upper())
        folder = tmp_path / kind.base_folder
        labels_key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
        for table in ("train_list", "test_list"):
            files = [
                batch(folder, file, labels_key, 6, classes) for file, _ in getattr(kind, table)
            ]
            monkeypatch.setattr(kind, table, files)
        names = {kind.meta["key"]: [f"class {k}" for k in range(classes)]}
        _, md5 = written(folder / kind.meta["filename"], names)
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5})
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("name", "files"),
    [("cifar10", [f"data_batch_{k}" for k in range(1, 6)]), ("cifar100", ["train"])],
)
def test_cifar(name, files, cifar, refused):
    root = cifar(name)
    data = load_dataset(DataOptions(name=name, root=str(root)), "train")
    folder = root / getattr(torchvision.datasets, name.upper()).base_folder
    contents = [pickle.loads((folder / file).read_bytes()) for file in files]
    pixels = np.concatenate([content["data"] for content in contents]).reshape(-1, 3, 32, 32)
    assert data.images.numpy().tolist() == pixels.tolist()
    assert data.images.is_contiguous()
    key = "labels" if name == "cifar10" else "fine_labels"
    labels = [label for content in contents for label in content[key]]
    assert data.labels.tolist() == labels
    assert data.labels.dtype == torch.int64
    assert data.classes == [f"class {k}" for k in range(10 if name == "cifar10" else 100)]
    assert (data.crop_padding, data.flip) == (4, True)
    test = load_dataset(DataOptions(name=name, root=str(root)), "test")
    assert len(test) == 6
    assert not test.images.equal(data.images[:6])
    assert refused == [], "nothing is downloaded that is there"


@pytest.mark.parametrize(("option", "padding"), [(None, 1), (0, 0), (2, 2)])
def test_padding_may_be_another_than_the_usual(option, padding):
    data = load_dataset(DataOptions(name="digits", crop_padding=option), "train")
    assert data.crop_padding == padding


def test_svhn(tmp_path, monkeypatch):
    """Labels are digits (its files say 10 for 0), images are not mirrored when augmented."""
    tables = {}
    for split in ("train", "test"):
        path = tmp_path / f"{split}_32x32.mat"
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
        scipy.io.savemat(path, {"X": pixels, "y": np.array([[10], [1], [9], [2]])})
        tables[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", tables)
    data = load_dataset(DataOptions(name="svhn", root=str(tmp_path)), "train")
    assert data.images.numpy().tolist() == pixels.transpose(3, 2, 0, 1).tolist()
    assert data.images.is_contiguous()
    assert data.labels.tolist() == [0, 1, 9, 2]
    assert (data.classes[0], len(data.classes), data.flip) == ("0", 10, False)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.write_text, (self.canary, "executed")


def corrupt_batch(root: Path) -> str:
    """A batch that is a pickle of somebody else's: its sum is checked before it is loaded."""
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps(Payload(root / "canary")))
    return "found cifar-10-batches-py, incomplete or damaged"


def missing_batch(root: Path) -> str:
    (root / "cifar-10-batches-py" / "test_batch").unlink()
    return "found cifar-10-batches-py, incomplete or damaged"


def corrupt_archive(root: Path) -> str:
    (root / "cifar-10-batches-py").rename(root.parent / f"{root.name}-away")
    (root / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    return r"found cifar-10-python\.tar\.gz, incomplete or damaged"


def nothing(root: Path) -> str:
    (root / "cifar-10-batches-py").rename(root.parent / f"{root.name}-gone")
    return "no files"


@pytest.mark.parametrize("damage", [corrupt_batch, missing_batch, corrupt_archive, nothing])
def test_cifar_that_is_damaged_and_cannot_be_downloaded(damage, cifar, refused):
    """The error names the folder, what is there, why the download failed, and what to do."""
    root = cifar("cifar10")
    said = damage(root)
    with pytest.raises(UserError, match=said) as raised:
        load_dataset(DataOptions(name="cifar10", root=str(root)), "train")
    message = str(raised.value)
    assert message.startswith(f"data.root: cifar10 in {root}: ")
    assert "no route to host" in message
    assert "DIST_ADV_DATA" in message
    assert "\n" not in message
    assert refused, "a download was tried"
    assert not (root / "canary").exists()


def test_root_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.root: cifar10 in .*file/data"):
        load_dataset(DataOptions(name="cifar10", root=str(tmp_path / "file" / "data")), "train")


def test_large_folders_stay_on_disk(folder):
    """By their decoded size: five images of 6 x 8."""
    gigabytes = 5 * 6 * 8 * 3 / 1e9
    assert isinstance(read(folder, resident_gb=gigabytes).images, torch.Tensor)
    streamed = read(folder, resident_gb=gigabytes / 2)
    assert isinstance(streamed.images, Files)
    assert torch.equal(streamed.images[torch.tensor([3, 0])], read(folder).images[[3, 0]])
    assert streamed.images.shape == read(folder).images.shape
