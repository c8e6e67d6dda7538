"""Sets of Hugging Face's `datasets`: the images of a folder, and every mistake said in a line.

Written by the library itself, as Parquet and as it saves them; nothing is asked of the Hub.
"""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dist_adv.config import load_config, parse_config
from dist_adv.data import Dataset, fingerprint, load_dataset, what_changed
from dist_adv.data.datasets import HfOptions
from dist_adv.data.files import Files, list_images
from dist_adv.data.hf import Rows
from dist_adv.data.image import Framing
from dist_adv.data.loader import Loader
from dist_adv.distributed import collectives
from dist_adv.doctor import examine
from dist_adv.errors import RankFailure, UserError
from dist_adv.packing import How, run_pack
from dist_adv.plan.command import Asked, run_plan
from dist_adv.testing import make_images
from dist_adv.training.checks import check_splits
from dist_adv.training.run import train_run

SIZE = 48
DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "natural.yaml"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library prepares is kept between tests of a worker, and not in anybody's home."""
    cache = tmp_path_factory.getbasetemp() / "hf-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of several sizes, grey, in CMYK and turned ones among them."""
    return make_images(tmp_path_factory.mktemp("made") / "images", classes=3, train=12, test=4)


def of_folder(folder: Path) -> datasets.DatasetDict:
    """A folder of images as the library has it."""
    splits = {}
    for split in ("train", "test"):
        found = list_images(folder / split)
        pictures = [
            {"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in found.paths
        ]
        table = datasets.Dataset.from_dict({"image": pictures, "label": found.labels})
        table = table.cast_column("image", datasets.Image())
        splits[split] = table.cast_column("label", datasets.ClassLabel(names=found.classes))
    return datasets.DatasetDict(splits)


def as_parquet(splits: datasets.DatasetDict, out: Path) -> Path:
    """In two files a split, as the Hub has large ones."""
    out.mkdir(parents=True)
    for split, rows in splits.items():
        for part in range(2):
            file = out / f"{split}-0000{part}-of-00002.parquet"
            rows.shard(2, part).to_parquet(file)
    return out


@pytest.fixture(scope="module")
def parquet(folder: Path) -> Path:
    return as_parquet(of_folder(folder), folder.parent / "parquet")


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    of_folder(folder).save_to_disk(folder.parent / "saved")
    return folder.parent / "saved"


def options(path: Path, **more: object) -> HfOptions:
    return HfOptions.model_validate({"path": str(path), "size": SIZE, **more})


def write(path: Path, columns: dict[str, list], **kinds: Any) -> Path:
    """A single split, `train`, of these columns."""
    table = datasets.Dataset.from_dict(columns)
    for name, kind in kinds.items():
        table = table.cast_column(name, kind)
    path.mkdir()
    table.to_parquet(path / "train.parquet")
    return path


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def batches(data: Dataset, rank: int = 0, ranks: int = 1) -> list:
    return list(Loader(data, 10, 3, torch.device("cpu"), rank=rank, world_size=ranks).epoch(2))


MORE: list[dict[str, Any]] = [
    {},
    {"resident_gb": 0.0, "randaugment": {}},
    {"crop_scale": (0.2, 1.0), "shorter": 60},
]


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("kind", ["parquet", "saved", "folder"])
def test_a_set_gives_the_batches_of_its_folder(kind, more, folder, request):
    """However the library has it: in Parquet, as it saves it, or as the names of files."""
    path = request.getfixturevalue(kind)
    ours = load_dataset(options(path, **more), "train")
    theirs = load_dataset(
        parse_data({"name": "imagefolder", "root": str(folder), "size": SIZE, **more}), "train"
    )
    assert (ours.classes, ours.crop_padding, ours.flip) == (
        theirs.classes,
        theirs.crop_padding,
        theirs.flip,
    )
    assert isinstance(ours.images, Files) == bool(more)
    for one, other in zip(batches(ours), batches(theirs), strict=True):
        assert one.x.equal(other.x)
        assert one.y.equal(other.y)


def parse_data(keys: dict[str, Any]) -> Any:
    tree = {"method": {"name": "natural"}, "model": {"name": "preact_resnet18"}, "data": keys}
    return parse_config(tree, "test").data


def test_batches_are_the_same_at_any_number_of_ranks(parquet):
    data = load_dataset(options(parquet, resident_gb=0.0, crop_scale=(0.2, 1.0)), "train")
    alone = batches(data)
    for rank in range(3):
        for whole, share in zip(alone, batches(data, rank, 3), strict=True):
            assert whole.x[rank::3].equal(share.x)


def test_a_folder_a_set_and_a_pack_train_the_same_weights(folder, parquet, tmp_path):
    run_pack(folder, tmp_path / "packed", How())
    places = {
        "imagefolder": {"root": str(folder)},
        "packed": {"root": str(tmp_path / "packed")},
        "hf": {"path": str(parquet)},
    }
    weights = set()
    for name, place in places.items():
        tree = {
            "method": {"name": "fast", "alpha": 0.1},
            "model": {"name": "preact_resnet18", "width": 2},
            "data": {"name": name, **place, "size": 16, "resident_gb": 0.0, "validation": 3},
            "train": {"epochs": 1, "batch_size": 11, "threads": 1, "precision": "fp32"},
            "eval": {"attacks": ["natural"], "every": 0},
            "track": {"wandb": {"mode": "disabled"}},
        }
        train_run(parse_config(tree, "test"), tmp_path / f"run-{name}", "none")
        model = next((tmp_path / f"run-{name}").glob("*.safetensors")).read_bytes()
        header = 8 + int.from_bytes(model[:8], "little")  # says which data these were
        weights.add(hashlib.sha256(model[header:]).hexdigest())
    assert len(weights) == 1


def test_threads_read_any_row_of_any_chunk():
    """Of a table in uneven chunks, an empty one and a part of a longer one among them."""
    rows = [{"bytes": png(level), "path": f"{level}.png"} for level in range(60)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    whole = pa.array(rows, kind)
    chunks = [whole[:1], whole[1:1], whole[1:30], whole[30:60]]
    records = Rows(pa.chunked_array(chunks, kind), "it")
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0)) % 60
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: records.read(k, Framing(), None)[0, 0, 0], order.tolist()))
    assert found == order.tolist()
    part = records.part([50, 40, 30, 0]).part([3, 1])
    assert [part.read(k, Framing(), None)[0, 0, 0] for k in range(len(part))] == [0, 40]
    assert part.name(1) == "it: row 40 (40.png)"
    assert list(records.sizes()) == [len(png(level)) for level in range(60)]


def test_labels_are_names_or_all_values_in_order(tmp_path):
    pictures = [{"bytes": png(level), "path": None} for level in range(4)]
    columns = {"image": pictures, "number": [10, -1, 9, 10], "animal": ["dog", "cat", "ant", "dog"]}
    path = write(tmp_path / "set", columns, image=datasets.Image())
    for label, classes, labels in (
        ("number", ["-1", "9", "10"], [2, 0, 1, 2]),
        ("animal", ["ant", "cat", "dog"], [2, 1, 0, 2]),
    ):
        data = load_dataset(options(path, label=label), "train")
        assert (data.classes, data.labels.tolist()) == (classes, labels)


def test_columns_are_found_or_those_that_exist_are_named(tmp_path):
    pictures = [{"bytes": png(level), "path": None} for level in range(3)]
    other = list(reversed(pictures))
    two = {"photo": pictures, "mask": other, "fine": [0, 1, 0], "coarse": [0, 0, 1], "x": [0.5] * 3}
    names = datasets.ClassLabel(names=["a", "b"])
    kinds = {"photo": datasets.Image(), "mask": datasets.Image(), "fine": names, "coarse": names}
    path = write(tmp_path / "two", two, **kinds)
    data = load_dataset(options(path, image="mask", label="coarse"), "train")
    assert data.images[:, 0, 0, 0].tolist() == [2, 1, 0]
    assert data.labels.tolist() == [0, 0, 1]
    known = r"name one of photo \(.*\), mask \(.*\), fine \(int64\), coarse \(int64\), x "
    for keys, says in (
        ({}, rf"data\.image: no single column is Image; {known}"),
        ({"image": "photo"}, rf"data\.label: no single column is ClassLabel; {known}"),
        ({"image": "pic", "label": "fine"}, rf"data\.image: there is no column 'pic'; {known}"),
        ({"image": "fine", "label": "fine"}, r"data\.image: fine holds int64, no images; name"),
        ({"image": "photo", "label": "x"}, r"data\.label: x holds float64, neither names nor"),
    ):
        with pytest.raises(UserError, match=says):
            load_dataset(options(path, **keys), "train")


def test_a_column_of_bytes_is_one_of_pictures(tmp_path):
    """As Parquet has it that another program wrote."""
    table = pa.table({"jpg": [png(5), png(3)], "cls": [1, 0]})
    pq.write_table(table, tmp_path / "train.parquet")
    keys = {"image": "jpg", "label": "cls", "size": None}
    data = load_dataset(options(tmp_path / "train.parquet", **keys), "train")
    assert data.images[:, 0, 0, 0].tolist() == [5, 3]
    assert data.labels.tolist() == [1, 0]


def test_rows_without_a_label_and_a_single_class_are_refused(tmp_path):
    """Hidden labels, as the test splits of competitions have, are -1 in a ClassLabel."""
    pictures = [{"bytes": png(level), "path": None} for level in range(3)]
    hidden = write(
        tmp_path / "hidden",
        {"image": pictures, "label": [0, -1, -1]},
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["a", "b"]),
    )
    with pytest.raises(UserError, match=r"hidden: train: 2 of 3 rows have no label in label"):
        load_dataset(options(hidden), "train")
    lost = write(tmp_path / "lost", {"image": pictures, "label": ["a", None, "b"]})
    with pytest.raises(UserError, match=r"lost: train: 1 of 3 rows have no label in label"):
        load_dataset(options(lost), "train")
    single = write(tmp_path / "single", {"image": pictures, "label": ["a"] * 3})
    with pytest.raises(UserError, match="a single class, a: there is nothing to tell apart"):
        load_dataset(options(single), "train")


def test_splits_are_chosen_by_their_names_or_parts(parquet, saved, tmp_path):
    names = datasets.load_from_disk(saved)
    of = {"train": names["train"], "validation": names["test"].select(range(3, 12))}
    datasets.DatasetDict(of).save_to_disk(tmp_path / "validation")
    assert len(load_dataset(options(tmp_path / "validation"), "test")) == 9
    datasets.DatasetDict(of | {"test": names["test"]}).save_to_disk(tmp_path / "three")
    assert len(load_dataset(options(tmp_path / "three"), "test")) == 12
    assert len(load_dataset(options(tmp_path / "three", test_split="validation"), "test")) == 9
    keys = {"train_split": "train[:75%]", "test_split": "train[75%:]+test"}
    parts = options(parquet, **keys)
    train, test = load_dataset(parts, "train"), load_dataset(parts, "test")
    whole = load_dataset(options(parquet), "train")
    assert torch.cat([train.images, test.images[:9]]).equal(whole.images)
    assert torch.cat([train.labels, test.labels[:9]]).equal(whole.labels)
    assert len(test) == 21
    for split, keys, says in (
        (
            "train",
            {"train_split": "trian"},
            r"train_split: .*: has no split 'trian'; it has train",
        ),
        ("test", {"test_split": "test[x]"}, r"test_split: .* no split 'test\[x\]'; .* test \(12\)"),
        ("train", {"train_split": "train[:0]"}, r"data\.train_split: .* has no images"),
    ):
        with pytest.raises(UserError, match=says):
            load_dataset(options(parquet, **keys), split)


def test_one_file_is_a_single_split(parquet):
    file = parquet / "train-00000-of-00002.parquet"
    assert len(load_dataset(options(file), "train")) == 18
    with pytest.raises(UserError, match=r"test_split: .* no split 'test'; .* part like train\[90"):
        load_dataset(options(file), "test")


def changed(one: HfOptions, other: HfOptions, split: str = "train") -> list[str]:
    prints = [{split: load_dataset(each, split).fingerprint} for each in (one, other)]
    return what_changed(*prints)


def test_a_fingerprint_knows_the_images_not_their_place(folder, parquet, saved, tmp_path):
    for other in (saved, folder):
        assert changed(options(parquet), options(other)) == []
    splits = of_folder(folder)
    rows = splits["train"].cast_column("image", datasets.Image(decode=False)).to_list()
    names = splits["train"].features["label"].names

    def other_set(name: str, rows: list[dict]) -> HfOptions:
        columns = {key: [row[key] for row in rows] for key in ("image", "label")}
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        return options(write(tmp_path / name, columns, **kinds), resident_gb=0.0)

    fewer = other_set("fewer", rows[1:])
    assert changed(options(parquet), fewer) == ["train: 35 images instead of 36"]
    moved = other_set("moved", [*rows[:-1], rows[-1] | {"label": 0}])
    assert changed(options(parquet), moved) == ["train: the same number of images, but other names"]
    content = rows[5]["image"]["bytes"]
    for name, image in (("longer", content + b"\0"), ("as long", content[:-3] + b"abc")):
        picture = {"bytes": image, "path": rows[5]["image"]["path"]}
        found = other_set(name, [*rows[:5], rows[5] | {"image": picture}, *rows[6:]])
        assert changed(options(parquet), found) == [
            "train: the same number of images, but other contents"
        ]
    swapped = other_set("swapped", [rows[1], rows[0], *rows[2:]])
    assert changed(options(parquet), swapped)


def test_a_fingerprint_reads_a_part_of_many_images(monkeypatch):
    """The size of all, the bytes of some: so a large set takes seconds."""
    monkeypatch.setattr(fingerprint, "_LOOKED_INTO", 4)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": png(level), "path": None} for level in range(36)]

    def found(rows: list[dict], read: list[int]) -> str:
        records = Rows(pa.chunked_array([pa.array(rows, kind)]), "it")

        def content(number: int) -> bytes:
            read.append(number)
            return records.content(number)

        return fingerprint.of_rows([0] * 36, ["a"], records.sizes, content)["contents"]

    read: list[int] = []
    before = found(rows, read)
    assert len(set(read)) == 4
    other = next(number for number in range(36) if number not in read)
    rows[other]["bytes"] += b"\0"
    assert found(rows, []) != before


def test_a_damaged_or_missing_picture_is_named(tmp_path):
    good = [{"bytes": png(level), "path": f"{level}.png"} for level in range(12)]
    for name, picture, says in (
        ("damaged", {"bytes": b"no picture", "path": "7.png"}, r"\(7\.png\): not a readable image"),
        ("empty", None, ": has no image"),
    ):
        path = write(
            tmp_path / name,
            {"image": [*good[:7], picture, *good[8:]], "label": ["a", "b"] * 6},
            image=datasets.Image(decode=False),
        )
        expected = rf"^data\.path: .*{name}: train: row 7.*{says}"
        with pytest.raises(UserError, match=expected):
            load_dataset(options(path, image="image"), "train")
        if name == "damaged":
            data = load_dataset(options(path, image="image", resident_gb=0.0), "train")
            with pytest.raises(RankFailure, match=expected):
                batches(data)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    gone = Rows(pa.chunked_array([[{"path": "/nowhere/7.png"}]], kind), "it")
    for ask in (lambda: gone.content(0), lambda: list(gone.sizes())):
        with pytest.raises(UserError, match=r"^data\.path: it: row 0 \(/nowhere/7\.png\): No such"):
            ask()


def test_classes_must_be_the_same_and_in_the_same_order(parquet):
    train, test = (load_dataset(options(parquet), split) for split in ("train", "test"))
    check_splits(train, test)
    for classes, says in (
        (test.classes[1:], r"data\.path: the train split has 3 classes and the test split 2"),
        (test.classes[::-1], r"data\.path: the train split has the classes in another order"),
    ):
        with pytest.raises(UserError, match=says):
            check_splits(train, replace(test, classes=classes))


def test_what_cannot_be_loaded_is_said_in_a_line(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"no parquet" * 9)
    cannot = r"^data\.path: {}: cannot be loaded \(.*\); name a set of the Hub, a folder or a .parq"
    for keys, says in (
        ({"path": "nobody/nothing"}, cannot.format("nobody/nothing")),
        ({"path": str(tmp_path / "empty")}, cannot.format(".*empty")),
        ({"path": str(tmp_path / "damaged")}, cannot.format(".*damaged")),
        ({"path": str(tmp_path / "gone")}, cannot.format(".*gone")),
        ({"path": str(saved), "subset": "large"}, r"data\.subset: .* one set as it is; leave it"),
        ({"path": str(saved), "revision": "main"}, r"data\.revision: .* leave it out"),
    ):
        with pytest.raises(UserError, match=says) as raised:
            load_dataset(HfOptions.model_validate(keys), "train")
        assert "\n" not in str(raised.value)


def test_a_library_that_is_not_installed(parquet, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data\.name: hf: datasets is not installed; pip install "):
        load_dataset(options(parquet), "train")


def test_one_process_a_node_prepares_a_set(parquet, monkeypatch):
    inside = []
    load = datasets.load_dataset

    @contextmanager
    def first() -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    def loaded(*given: Any, **more: Any) -> Any:
        inside.append("load")
        return load(*given, **more)

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    load_dataset(options(parquet), "train", first)
    assert inside == ["in", "load", "out"]


def test_ranks_may_have_a_set_in_other_places(accelerator, parquet, monkeypatch):
    told: list[dict] = []
    monkeypatch.setattr(collectives, "check_same_start", lambda _, about: told.append(about))
    for path in (str(parquet), "elsewhere"):
        data = {"name": "hf", "path": path}
        tree = {"method": {"name": "natural"}, "model": {"name": "preact_resnet18"}, "data": data}
        collectives.check_started_alike(parse_config(tree, "test"), accelerator, {})
    assert told[0] == told[1]
    assert told[0]["data.name"] == "hf"


def test_keys_that_do_not_fit():
    for keys, says in (
        ({"name": "hf"}, r"data\.path: missing; set it"),
        ({"name": "hf", "path": "a/b", "root": "images"}, r"root: hf has data\.path instead"),
        ({"name": "hf", "path": "a/b", "crop_scale": [0.1, 1]}, r"needs data\.size"),
        ({"name": "cifar10", "path": "a/b"}, r"data\.path: unknown key"),
    ):
        with pytest.raises(UserError, match=says):
            parse_data(keys)


def test_doctor_and_plan(parquet, monkeypatch, capsys):
    def looked(*overrides: str) -> Any:
        found = examine(DIGITS, ["data.name=hf", *overrides], Path("runs"))
        return next(each for each in found if each.what == "data")

    assert looked(f"data.path={parquet}").found == f"hf in {parquet}: not looked into"
    hub = looked("data.path=somebody/images")
    assert (hub.level, hub.found) == ("ok", "somebody/images of the Hugging Face Hub")
    assert "HF_HOME" in hub.advice
    config = load_config(DIGITS, ["data.name=hf", "data.path=somebody/images", "data.size=32"])
    with pytest.raises(UserError, match=r"--images, --classes and data[.]size: a plan does"):
        run_plan(config, Asked("1,2", bandwidth="10", step_ms="5"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert looked("data.path=somebody/images").level == "problem"
