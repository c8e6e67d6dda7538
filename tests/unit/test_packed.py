"""Packs: the same images as the folder that they were made of, and every damage said in a line."""

import io
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms import v2

from dist_adv import cli, packing, rng
from dist_adv.data import DataOptions, load_dataset
from dist_adv.data.files import Files
from dist_adv.data.image import TRIES, Framing, _random_box, decode
from dist_adv.data.loader import Loader
from dist_adv.data.packed import check_pack
from dist_adv.errors import RankFailure, UserError
from dist_adv.packing import How, pack, run_pack
from dist_adv.testing import make_images

SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of several sizes, grey, in CMYK and turned ones among them."""
    return make_images(tmp_path_factory.mktemp("made") / "images", classes=3, train=12, test=4)


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """In several tar files of a class or two."""
    out = tmp_path / "packed"
    for split in ("train", "test"):
        pack(folder / split, out / split, How(shard_mb=1))
    return out


def options(root: Path, name: str = "packed", **more: object) -> DataOptions:
    given = {"name": name, "root": str(root), "size": SIZE, "resident_gb": 0.0, **more}
    return DataOptions.model_validate(given)


def batches(root: Path, name: str, rank: int = 0, ranks: int = 1, **more: object) -> list:
    data = load_dataset(options(root, name, **more), "train")
    loader = Loader(data, 10, 3, torch.device("cpu"), rank=rank, world_size=ranks)
    return list(loader.epoch(2))


@pytest.mark.parametrize("more", [{}, {"crop_scale": (0.2, 1.0), "shorter": 60}])
@pytest.mark.parametrize("how", [How(shard_mb=1), How(raw=True, size=90)])
def test_a_pack_gives_the_batches_of_its_folder(more, how, folder, tmp_path):
    """Of an array, those of the folder whose pictures have the array's size already."""
    run_pack(folder, tmp_path / "packed", how)
    if how.raw:
        for path in (tmp_path / "same").parent.glob("packed/*/images.npy"):
            for number, pixels in enumerate(np.load(path)):
                label = np.load(path.with_name("labels.npy"))[number]
                place = tmp_path / "same" / path.parent.name / f"class_{label:03d}"
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"{number:05d}.png")
        folder = tmp_path / "same"
    ours = batches(tmp_path / "packed", "packed", **more)
    theirs = batches(folder, "imagefolder", **more)
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.x.equal(other.x)
        assert one.y.equal(other.y)


def test_boxes_are_the_same_at_any_number_of_ranks(packed):
    more = {"crop_scale": (0.2, 1.0)}
    alone = batches(packed, "packed", **more)
    shares = [batches(packed, "packed", rank, 3, **more) for rank in range(3)]
    for number, whole in enumerate(alone):
        for rank in range(3):
            assert whole.x[rank::3].equal(shares[rank][number].x)
    again = load_dataset(options(packed, **more), "train")
    later = list(Loader(again, 10, 3, torch.device("cpu")).epoch(2, start=2))
    assert later[0].x.equal(alone[2].x)
    # Of the sum over an image, which no mirror changes: another box in another epoch.
    sums = [
        {n: x.sum() for batch in each for n, x in zip(batch.samples.tolist(), batch.x, strict=True)}
        for each in (alone, Loader(again, 10, 3, torch.device("cpu")).epoch(3))
    ]
    assert all(sums[0][n] != sums[1][n] for n in sums[0])


def test_half_of_the_boxes_are_mirrored(packed):
    """As the keys of the samples say, which mirror the images of other data sets, too."""
    data = load_dataset(options(packed, crop_scale=(0.2, 1.0)), "train")
    sides = [
        next(iter(Loader(replace(data, flip=flip), 36, 3, torch.device("cpu")).epoch(0)))
        for flip in (True, False)
    ]
    turned = rng.integers(rng.substream(sides[0].keys, "flip"), 2).bool()
    assert 5 < turned.sum() < 31
    assert sides[0].x[~turned].equal(sides[1].x[~turned])
    assert sides[0].x[turned].equal(sides[1].x[turned].flip(3))


def test_boxes_are_of_the_training_split_alone(packed):
    keys = {"crop_scale": (0.2, 1.0), "resident_gb": 8.0}
    train, test = (load_dataset(options(packed, **keys), split) for split in ("train", "test"))
    assert (type(train.images), train.crop_padding) == (Files, 0)  # which has no borders to crop
    assert isinstance(test.images, torch.Tensor)
    plain = load_dataset(options(packed, augment=False, **keys), "train")
    assert isinstance(plain.images, torch.Tensor)


def test_a_part_of_a_part(folder, tmp_path):
    for how in (How(raw=True, size=32), How(shard_mb=1)):
        out = tmp_path / str(how.raw)
        pack(folder / "train", out / "train", how)
        files = load_dataset(options(out, size=32), "train").images
        part = files.part(torch.tensor([7, 5, 3])).part(torch.tensor([2, 0]))
        assert part.all().equal(files[torch.tensor([3, 7])])


def test_what_is_measured_is_the_centre(packed, folder):
    """As torchvision's Resize and CenterCrop, of pictures that are not turned or in odd modes."""
    found = load_dataset(options(packed, shorter=60, crop_scale=(0.2, 1.0)), "test")
    usual = v2.Compose([v2.Resize(60), v2.CenterCrop(SIZE)])
    picture = Image.open(sorted((folder / "test").glob("*/*.jpg"))[0])
    ours = found.images[torch.tensor([0])][0].permute(1, 2, 0)
    assert ours.tolist() == np.asarray(usual(picture)).tolist()


def test_boxes_are_drawn_as_torchvision_draws_them(monkeypatch):
    """With the same random numbers; it asks for the area, the shape, then the corner."""
    draw = np.random.default_rng(0)
    for width, height, scale in ((100, 80, (0.08, 1.0)), (30, 200, (0.5, 1.0)), (9, 9, (0.2, 0.3))):
        for _ in range(200):
            draws = draw.random((TRIES, 4))
            numbers = iter(draws)
            corner = {}

            def uniform(tensor, low, high, numbers=numbers, corner=corner):
                if "shape" in corner:
                    shape = corner.pop("shape")
                else:
                    area, shape, corner["column"], corner["row"] = next(numbers)
                    corner["shape"] = shape
                    return tensor.fill_(low + (high - low) * area)
                return tensor.fill_(low + (high - low) * shape)

            def integer(low, high, size, corner=corner):
                key = "row" if "row" in corner else "column"
                return torch.tensor([int(corner.pop(key) * high)])

            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "uniform_", uniform)
                patch.setattr(torch, "randint", integer)
                theirs = v2.RandomResizedCrop(8, scale).make_params(
                    [Image.new("L", (width, height))]
                )
            left, top, right, bottom = _random_box(width, height, scale, draws.tolist())
            assert abs(left - theirs["left"]) + abs(top - theirs["top"]) <= 1
            assert abs(right - left - theirs["width"]) + abs(bottom - top - theirs["height"]) <= 1


def test_others_read_the_tar_files(packed, folder):
    names, labels = [], []
    for path in sorted((packed / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith(".cls"):
                    labels.append(int(content))
                else:
                    names.append(member.name)
                    assert content == (folder / "train" / member.name).read_bytes()
    assert names == [
        str(path.relative_to(folder / "train")) for path in sorted(folder.glob("train/*/*"))
    ]
    assert labels == [int(name[6:9]) for name in names]


@pytest.mark.parametrize("how", [How(), How(size=8)])
def test_to_webdataset_each_picture_is_a_sample(how, tmp_path):
    """Whose name ends at the first dot of a file, in a folder of whatever name."""
    for label in "a.b", "c":
        for name in ("x.png", "x.bmp", "y.1.png", "y.2.png", "y-1.png"):
            path = tmp_path / "images" / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (len(path.parent.name), 0, 0)).save(path)
    pack(tmp_path / "images", tmp_path / "out", how)
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        members = tar.getnames()
    keys = [re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member).groups() for member in members]
    assert [ending == "cls" for _, ending in keys] == [False, True] * 10
    assert [key for key, _ in keys[::2]] == [key for key, _ in keys[1::2]]
    assert len({key for key, _ in keys}) == 10


def test_a_killed_packing_goes_on(folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    spans = range(9), range(9, 20), range(20, 36)
    monkeypatch.setattr(packing, "_spans", lambda sizes, limit: spans)
    pack(folder / "train", whole, How())
    write, out = packing._write_shard, tmp_path / "out"

    def killed(*arguments):
        if arguments[-1] == 1:
            (out / ".partial-00001.tar").write_bytes(b"half a file")
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(folder / "train", out, How())
    with pytest.raises(UserError, match="packing has not ended; give the same `dist-adv pack`"):
        load_dataset(options(tmp_path), "out")
    with pytest.raises(UserError, match="a pack of other images or settings"):
        pack(folder / "train", out, How(size=32))
    before = (out / "00000.tar").stat().st_ino
    pack(folder / "train", out, How())
    assert (out / "00000.tar").stat().st_ino == before
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    for name in os.listdir(whole):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert pack(folder / "train", out, How()) == 36  # and once more changes nothing
    for other in (How(size=32), How(quality=80)):
        with pytest.raises(UserError, match="a pack of other images or settings"):
            pack(folder / "train", out, other)
    with pytest.raises(UserError, match="a pack of other images or settings"):
        pack(folder / "test", out, How())


def test_smaller_pictures_are_packed_where_that_is_asked(folder, tmp_path):
    pack(folder / "train", tmp_path / "train", How(size=40))
    for path in (tmp_path / "train").glob("*.tar"):
        with tarfile.open(path) as tar:
            pictures = [
                Image.open(io.BytesIO(tar.extractfile(member).read()))
                for member in tar
                if member.name.endswith(".jpg")
            ]
    assert {min(picture.size) for picture in pictures} == {40}
    assert {picture.mode for picture in pictures} == {"RGB"}


def damage(path: Path, at: int, what: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(what)


def test_damaged_packs_are_refused(packed, tmp_path):
    train = packed / "train"
    tar, index, rows = train / "00000.tar", train / "index.json", train / "index.npy"
    good = {path: path.read_bytes() for path in (tar, index, rows)}
    about = np.load(rows)

    def saved(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    elsewhere, other = about.copy(), about.copy()
    elsewhere["offset"][3] = 1 << 40
    other["label"][0] = 9
    for path, content, says in (
        (tar, good[tar][:-512], r"00000\.tar: has [\d,]+ bytes and the index says [\d,]+; copy it"),
        (index, b"{}", r"index\.json: is no index of a pack; restore it"),
        (rows, saved(elsewhere), r"index\.npy: names bytes behind the end of a tar file"),
        (rows, saved(other), r"index\.npy: names a tar file or a class that there is not"),
        (rows, bytes(len(good[rows])), r"index\.npy: is no array"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=says):
            load_dataset(options(packed), "train")
        path.write_bytes(good[path])
    with pytest.raises(UserError, match="no split of a pack; make one with `dist-adv pack`"):
        load_dataset(options(make_images(tmp_path / "folder", 2, 1, 1)), "train")
    tar.unlink()
    with pytest.raises(UserError, match=r"00000\.tar: No such file"):
        load_dataset(options(packed), "train")


def test_a_damaged_record_is_named(packed):
    """Bytes that have changed since: found while it is used, by its place, and by `doctor`."""
    row = np.load(packed / "train" / "index.npy")[7]
    tar = packed / "train" / f"{row['shard']:05d}.tar"
    damage(tar, int(row["offset"]), b"no picture" * 20)
    data = load_dataset(options(packed), "train")
    says = rf"{tar.name}: record 7 at byte {row['offset']} \(class_000/00007\.jpg\): not a readable"
    with pytest.raises(RankFailure, match=says):
        list(Loader(data, 36, 0, torch.device("cpu")).epoch(0))
    with pytest.raises(UserError, match=rf"{tar.name}: is not what was packed"):
        check_pack(packed / "train")
    check_pack(packed / "test")


def test_pictures_that_cannot_be_packed(folder, tmp_path, capsys):
    broken = tmp_path / "images"
    make_images(broken, classes=2, train=2, test=1)
    (broken / "train" / "class_001" / "00001.jpg").write_bytes(b"no picture")
    assert cli._run(["pack", str(broken), str(tmp_path / "out")]) == 2
    assert "00001.jpg: not a readable image; repair or remove it" in capsys.readouterr().err
    assert cli._run(["pack", str(folder), str(tmp_path / "raw"), "--raw"]) == 2
    assert "give --size" in capsys.readouterr().err
    (broken / "test").rename(broken / "val")
    assert cli._run(["pack", str(broken), str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "images/test: is no folder; a source has train/<class>/ and test/<class>/" in said
    assert not (tmp_path / "none").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train").write_text("a file")
    assert cli._run(["pack", str(folder), str(tmp_path / "mine")]) == 2
    assert "name another folder" in capsys.readouterr().err


def test_a_class_whose_name_is_no_utf_8(tmp_path):
    source = tmp_path / "images"
    make_images(source, classes=2, train=2, test=2)
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        try:
            (source / split / "class_000").rename(source / split / name)
        except OSError:
            pytest.skip("this file system takes UTF-8 alone")
    run_pack(source, tmp_path / "out", How(size=8, raw=True))
    options = DataOptions(name="packed", root=str(tmp_path / "out"))
    assert name in load_dataset(options, "train").classes


def test_keys_that_do_not_fit():
    for keys, says in (
        ({"name": "cifar10", "crop_scale": (0.1, 1.0)}, "are not resized; leave it out"),
        ({"name": "packed", "crop_scale": (0.1, 1.0)}, "needs data.size"),
        ({"name": "packed", "size": 9, "crop_scale": (0.5, 0.1)}, "the least and the largest"),
        ({"name": "packed", "size": 9, "shorter": 8}, "is less than data.size=9"),
        ({"name": "theirs:Reds", "size": 8, "shorter": 9}, "shorter: is of pictures in folders"),
    ):
        with pytest.raises(ValueError, match=says):
            DataOptions.model_validate(keys)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_photographs_are_read_at_a_part_of_their_size(orientation, tmp_path, monkeypatch):
    """Turned or not they look as they do read whole: within a few levels, of smooth pixels."""
    y, x = np.mgrid[:900, :1400] / 60
    pixels = 128 + 60 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2)
    picture = Image.fromarray(pixels.astype(np.uint8))
    exif = picture.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    picture.save(tmp_path / "x.jpg", exif=exif)
    seen = []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda *given: seen.append(draft(*given)))
    part = decode(str(tmp_path / "x.jpg"), Framing(64))
    assert seen[0] is not None
    monkeypatch.setattr(Framing, "enough", lambda *sizes: None)
    whole = decode(str(tmp_path / "x.jpg"), Framing(64))
    assert part.shape == whole.shape == (64, 64, 3)
    assert np.abs(part.astype(int) - whole).max() <= 6


def test_framing_of_a_small_part_of_a_large_picture():
    """A JPEG may be decoded at half its size or less, where that is enough."""
    assert Framing(64).enough(2000, 1000) == (256, 128)
    assert Framing(64).enough(120, 100) is None
    assert Framing(64, scale=(0.1, 1.0)).enough(2000, 1000) is None
