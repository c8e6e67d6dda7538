"""Folders of images as people have them: what counts as one, and what is said of the rest."""

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from dist_adv.config import parse_config
from dist_adv.data import DataOptions, Dataset, load_dataset, what_changed
from dist_adv.data.files import Files, list_images
from dist_adv.data.image import Framing
from dist_adv.data.records import Paths
from dist_adv.distributed.failures import plain_failures
from dist_adv.errors import RankFailure, UserError
from dist_adv.training.checks import check_splits
from dist_adv.training.trainer import Trainer


def picture(path: Path, shade: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of three images a split."""
    for split in ("train", "test"):
        for number, label in enumerate(("cat", "dog")):
            for k in range(3):
                picture(tmp_path / split / label / f"{k}.png", 10 * k + number)
    return tmp_path


def read(root: Path, split: str = "train", **options) -> Dataset:
    return load_dataset(DataOptions(name="imagefolder", root=str(root), **options), split)


def refusal(root: Path) -> str:
    """The one line by which a folder is refused."""
    with pytest.raises(UserError) as raised:
        read(root)
    line = str(raised.value)
    assert line.startswith("data.root: ")
    assert line.isprintable()
    assert len(line) < 600
    return line


@contextmanager
def said() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("dist_adv")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


# --- what is listed ------------------------------------------------------------------------------


def test_the_order_is_torchvision_s(root):
    """Folders in folders, links, capital letters: a run of an earlier version goes on in it."""
    for name in ("z/1.png", "a/b/2.JPG", "a-b/3.Jpeg", "A/4.bmp", "a/5.png", "ü.webp"):
        picture(root / "train" / "cat" / name)
    (root / "train" / "dog" / "link").symlink_to(root / "train" / "cat" / "a")
    (root / "train" / "dog" / "9.png").symlink_to(root / "test" / "dog" / "0.png")
    found, theirs = list_images(root / "train"), ImageFolder(str(root / "train"))
    assert list(zip(found.paths, found.labels, strict=True)) == theirs.samples
    assert found.classes == theirs.classes
    assert found.sizes == [os.path.getsize(path) for path in found.paths]


def test_hidden_folders_and_files_are_passed_over_aloud(root):
    """Jupyter's, macOS's and a network disk's; and what is no image by its name."""
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        picture(root / "train" / name / "0.png")
    picture(root / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "notes.txt", "more.txt"):
        (root / "train" / "cat" / name).write_bytes(b"no image")
    (root / "train" / "readme.md").touch()
    with said() as lines:
        data = read(root)
    assert data.classes == ["cat", "dog"]
    assert len(data) == 6
    (line,) = lines
    assert line.startswith(f"data.root: {root / 'train'}: passed over: ")
    for what in ("hidden .ipynb_checkpoints (2)", "hidden files (2)", "*.txt (2)"):
        assert what in line
    assert " and 2 more" in line


def test_nothing_is_said_of_a_plain_folder(root):
    with said() as lines:
        read(root)
    assert lines == []


def test_greys_colours_and_transparency_mix(root):
    Image.new("L", (8, 8), 7).save(root / "train" / "cat" / "0.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(root / "train" / "cat" / "1.png")
    assert read(root).images[:3, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3], [20, 0, 0]]


# --- what is refused -----------------------------------------------------------------------------


def test_a_single_class(root):
    (root / "train" / "dog").rename(root / "dog")
    assert "has a single class, cat" in refusal(root)


def test_many_empty_classes(root):
    for k in range(300):
        (root / "train" / f"c{k:03d}").mkdir()
    assert "no valid file for the classes c000, c001, c002, c003, c004 and 295 more" in refusal(
        root
    )


def circle(root: Path) -> None:
    (root / "train" / "cat" / "again").symlink_to(root / "train")


def link_to_itself(root: Path) -> None:
    (root / "train" / "cat" / "9.png").symlink_to("9.png")


def broken_link(root: Path) -> None:
    (root / "train" / "cat" / "9.png").symlink_to(root / "moved" / "9.png")


def broken_class(root: Path) -> None:
    (root / "train" / "emu").symlink_to(root / "moved")


def pipe(root: Path) -> None:
    os.mkfifo(root / "train" / "cat" / "9.png")


def odd_name(root: Path) -> None:
    (root / "train" / "cat" / "new\nline\x1b[31m.png").write_bytes(b"no image")


def no_text(root: Path) -> None:
    path = os.fsencode(root / "train" / "cat") + b"/caf\xe9.png"
    Path(os.fsdecode(path)).write_bytes(b"no image")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (circle, "is a link to a folder that it lies in"),
        (link_to_itself, "9.png: Too many levels of symbolic links"),
        (broken_link, "9.png: No such file or directory"),
        (broken_class, "emu: No such file or directory"),
        (pipe, "9.png: is no regular file"),
        (odd_name, r"new\nline\x1b[31m.png: not a readable image"),
        (no_text, r"caf\xe9.png: not a readable image"),
    ],
)
def test_odd_entries(spoil: Callable[[Path], None], says, root):
    """Found while the folder is listed, however it is read; a pipe would be waited for."""
    spoil(root)
    assert says in refusal(root)


@contextmanager
def nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("locked", ["train", "train/dog", "train/dog/1.png"])
def test_no_permission(locked, root):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are for root alone
        shutil.copytree(root, place, dirs_exist_ok=True)
        os.chmod(place, 0o755)
        (Path(place) / locked).chmod(0)
        with nobody():
            line = refusal(Path(place))
        (Path(place) / locked).chmod(0o755)
    assert "Permission denied" in line
    assert locked in line


def a_file(folder: Path) -> str:
    (folder / "x").touch()
    return str(folder / "x")


def links_in_a_circle(folder: Path) -> str:
    (folder / "x").symlink_to("x")
    return str(folder / "x")


@pytest.mark.parametrize("name", ["imagefolder", "cifar10", "svhn"])
@pytest.mark.parametrize(
    "make",
    [a_file, links_in_a_circle, lambda _: "x" * 300, lambda _: "a\0b", lambda _: "/x\ny/~z"],
)
def test_roots_that_are_none(make, name, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError) as raised:
        load_dataset(DataOptions(name=name, root=make(tmp_path)), "train")
    assert str(raised.value).startswith("data.root: ")
    assert str(raised.value).isprintable()


# --- splits that do not fit together -------------------------------------------------------------


def made_up(classes: list[str], size: tuple[int, int] = (8, 8)) -> Dataset:
    images = torch.zeros(2, 3, *size, dtype=torch.uint8)
    return Dataset("made up", images, torch.zeros(2, dtype=torch.int64), classes, 0, False)


def test_splits_of_other_classes_name_a_few():
    many, ten = [f"n{k:05d}" for k in range(300)], [f"n{k:05d}" for k in range(10)]
    for train, test, alone in ((many, ten, "train"), (ten, many, "test")):
        with pytest.raises(UserError) as raised:
            check_splits(made_up(train), made_up(test))
        line = str(raised.value)
        assert f"290 are in the {alone} split alone (n00010, n00011" in line
        assert " and 285 more)" in line
        assert len(line) < 300


def test_splits_of_other_sizes(root, accelerator):
    for path in (root / "test").rglob("*.png"):
        picture(path, size=(7, 5))
    tree = {
        "method": {"name": "natural"},
        "data": {"name": "imagefolder", "root": str(root)},
        "train": {"batch_size": 5, "precision": "fp32"},
    }
    with pytest.raises(UserError, match=r"^data\.size: .*8x8.*7x5.*data\.size=8"):
        Trainer(parse_config(tree, "here"), accelerator)


# --- fingerprints --------------------------------------------------------------------------------


def prints(root: Path, **options) -> dict:
    return {split: read(root, split, **options).fingerprint for split in ("train", "test")}


def test_the_same_images_elsewhere_have_the_same_fingerprint(root, tmp_path):
    before = prints(root)
    assert before == prints(root, resident_gb=0)
    moved = tmp_path / "moved"
    moved.mkdir()
    for split in ("train", "test"):
        (root / split).rename(moved / split)
    picture(moved / "train" / ".ipynb_checkpoints" / "x.png")
    assert prints(moved) == before
    assert what_changed(before, prints(moved)) == []


def other_pixels(root: Path) -> None:
    """In a file of the same size and date."""
    path = root / "train" / "cat" / "1.png"
    content, times = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    size = len(content)
    picture(path, 11)
    assert path.stat().st_size == size
    os.utime(path, ns=(times, times))


def renamed(root: Path) -> None:
    (root / "train" / "cat" / "1.png").rename(root / "train" / "cat" / "1b.png")


def another_class(root: Path) -> None:
    (root / "train" / "cat" / "1.png").rename(root / "train" / "dog" / "x.png")


def one_more(root: Path) -> None:
    picture(root / "train" / "cat" / "3.png")


def a_third_class(root: Path) -> None:
    picture(root / "test" / "emu" / "3.png")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_pixels, ["train: the same number of images, but other contents"]),
        (renamed, ["train: the same number of images, but other names"]),
        (another_class, ["train: the same number of images, but other names"]),
        (one_more, ["train: 7 images instead of 6"]),
        (a_third_class, ["test: 7 images instead of 6", "test: 3 classes instead of 2"]),
    ],
)
def test_changed_images_are_told(change, says, root):
    before = prints(root)
    change(root)
    assert what_changed(before, prints(root)) == says


def test_images_in_memory_have_fingerprints(digits):
    assert digits.fingerprint is not None
    other = load_dataset(DataOptions(name="digits"), "train").fingerprint
    assert what_changed({"a": digits.fingerprint}, {"a": other}) == [
        "a: 1,438 images instead of 359"
    ]


# --- reading ahead -------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Files:
    for k in range(40):
        picture(tmp_path / f"{k}.png", k)
    return Files(Paths([str(tmp_path / f"{k}.png") for k in range(40)]), Framing(), 2)


@pytest.mark.parametrize("workers", [0, 1, 7])
def test_batches_come_in_order(workers, files):
    files.workers = workers
    batches = list(files.ahead(torch.randperm(40).split(6)))
    order = torch.cat([batch[:, 0, 0, 0] for batch in batches])
    assert [len(batch) for batch in batches] == [6] * 6 + [4]
    assert order.sort().values.tolist() == list(range(40))
    again = torch.cat([files[part][:, 0, 0, 0] for part in order.long().split(9)])
    assert again.equal(order)


def test_who_wants_one_batch_leaves_no_thread_behind(files):
    before = threading.active_count()
    (first,) = islice(files.ahead(torch.arange(40).split(5)), 1)
    assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_another_one_has_replaced(workers, files, tmp_path):
    files.workers = workers
    picture(tmp_path / "17.png", size=(8, 9))
    with pytest.raises(RankFailure, match=r"^data\.size: .*0\.png \(8x8\) and .*17\.png \(8x9\)"):
        list(files.ahead(torch.arange(40).split(5)))
    with pytest.raises(UserError, match=r"have 2 different sizes; set data\.size"):
        files.all()


def test_no_more_open_files_is_no_damage(files, monkeypatch):
    """A stand-in for `open` where the limit is reached."""

    def refuse(path, *rest):
        raise OSError(24, "Too many open files", path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(RankFailure, match=r"cannot be read \(Too many open files\).*ulimit -n"):
        list(files.ahead([torch.arange(3)]))


def test_no_more_threads(files, accelerator, monkeypatch):
    """A stand-in for a system that has given all it gives."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with (
        pytest.raises(
            RankFailure, match=r"another thread; raise ulimit -u, or lower data\.workers"
        ),
        plain_failures(accelerator, "train.batch_size", 8),
    ):
        files.all()


def test_large_images_are_exactly_what_pillow_reads(tmp_path):
    """In parallel, into the same memory."""
    draw = np.random.default_rng(0)
    for k in range(12):
        pixels = draw.integers(0, 256, (64, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.jpg")
    paths = [str(tmp_path / f"{k}.jpg") for k in range(12)]
    found = Files(Paths(paths), Framing(), 5)
    (batch,) = found.ahead([torch.arange(12)])
    expected = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert batch.permute(0, 2, 3, 1).numpy().tolist() == expected.tolist()
    assert found.all().equal(batch)
