"""Packs in stores: the batches of a pack on a disk, read by position; what fails is a line.

Tried are fsspec's store in memory, and http with a real server on this machine. A store that reads
on by itself, as some do, is a stand-in.
"""

import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.registry import known_implementations
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from dist_adv import packing
from dist_adv.data import DataOptions, load_dataset
from dist_adv.data.files import Files
from dist_adv.data.loader import Loader
from dist_adv.data.packed import check_pack
from dist_adv.data.stores import StoreShards, open_store
from dist_adv.doctor import examine
from dist_adv.errors import RankFailure, UserError
from dist_adv.packing import How, run_pack
from dist_adv.testing import make_images

DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "natural.yaml"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In three tar files a split."""
    folder = tmp_path_factory.mktemp("made")
    make_images(folder / "images", classes=3, train=12, test=4)

    def spans(sizes: Sequence[int], limit: int) -> list[range]:
        ends = [0, 5, len(sizes) // 2, len(sizes)]
        return [range(*pair) for pair in pairwise(ends)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_spans", spans)
        run_pack(folder / "images", folder / "packed", How())
    return folder / "packed"


@dataclass
class Server:
    """A folder on the web. asked: (path, Range) of each GET; ranges: whether it knows them."""

    folder: Path
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    ranges: bool = True
    address: str = ""


@pytest.fixture
def server(packed: Path) -> Iterator[Server]:
    about = Server(packed)

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.headers["Range"]
            about.asked.append((self.path, asked))
            path = Path(self.translate_path(self.path))
            if asked is None or not about.ranges or not path.is_file():
                super().do_GET()
                return
            first, last = asked.removeprefix("bytes=").split("-")
            content = path.read_bytes()
            part = content[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *words: Any) -> None:
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(packed)))
    about.address = f"http://127.0.0.1:{serving.server_port}"
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    yield about
    serving.shutdown()
    serving.server_close()
    thread.join()


@pytest.fixture
def memory(packed: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    store.put(str(packed), "/pack", recursive=True)
    yield "memory://pack"
    store.rm("/pack", recursive=True)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> str:
    found = request.getfixturevalue(request.param)
    return found.address if isinstance(found, Server) else found


def options(root: object, **more: object) -> DataOptions:
    given = {"name": "packed", "root": str(root), "size": 48, "resident_gb": 0.0, **more}
    return DataOptions.model_validate(given)


def batches(root: object, **more: object) -> list:
    data = load_dataset(options(root, **more), "train")
    return list(Loader(data, 10, 3, torch.device("cpu")).epoch(2))


@pytest.mark.parametrize("more", [{}, {"crop_scale": (0.2, 1.0)}])
@pytest.mark.parametrize("store", ["memory", "server"], indirect=True)
def test_a_store_gives_the_batches_of_the_disk(store, more, packed):
    ours, theirs = load_dataset(options(store), "train"), load_dataset(options(packed), "train")
    assert isinstance(ours.images, Files)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.classes == theirs.classes
    for one, other in zip(batches(store, **more), batches(packed, **more), strict=True):
        assert one.x.equal(other.x)
        assert one.y.equal(other.y)


@pytest.mark.parametrize("store", ["memory", "server"], indirect=True)
def test_many_threads_read_one_store(store, packed):
    ours, theirs = (load_dataset(options(root), "train").images for root in (store, packed))
    reads = 20_000 if store.startswith("memory") else 400
    order = (np.random.default_rng(0).permutation(reads) % 36).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet
    try:
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda number: ours.records.open(number).read(), order))
    finally:
        sys.setswitchinterval(interval)
    expected = [theirs.records.open(number).read() for number in range(36)]
    assert all(content == expected[number] for number, content in zip(order, found, strict=True))
    part = ours.part(torch.tensor([7, 5, 3])).part(torch.tensor([2, 0]))
    assert isinstance(part.records, StoreShards)
    assert part.all().equal(theirs[torch.tensor([3, 7])])


def test_no_more_is_read_than_is_asked_for(server, packed):
    """A picture is one request for its bytes; what is read whole are the index's two files."""
    data = load_dataset(options(server.address), "train")
    whole = sorted(path for path, span in server.asked if span is None)
    assert whole == ["/train/index.json", "/train/index.npy"]
    row = np.load(packed / "train" / "index.npy")[20]
    server.asked.clear()
    data.images.pixels(20)
    first, last = row["offset"], row["offset"] + row["length"] - 1
    assert server.asked == [(f"/train/{row['shard']:05d}.tar", f"bytes={first}-{last}")]


class ReadsOn(AbstractFileSystem):
    """Stands in for a store whose files read on for megabytes; notes what is fetched."""

    protocol = "readson"
    fetched: list[tuple[int, int]] = []
    content = bytes(range(256)) * 64

    def info(self, path: str, **given: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.content), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **given: Any) -> AbstractBufferedFile:
        given.pop("autocommit", None)
        return _Fetched(self, path, mode, **given)


class _Fetched(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        ReadsOn.fetched.append((start, end))
        return ReadsOn.content[start:end]


def test_a_file_that_would_read_on_does_not(monkeypatch):
    fsspec.register_implementation("readson", ReadsOn, clobber=True)
    monkeypatch.setattr(ReadsOn, "fetched", [])
    found = (open_store("readson://pack") / "00000.tar").read_range(300, 20)
    assert found == ReadsOn.content[300:320]
    assert ReadsOn.fetched == [(300, 320)]


def test_what_is_not_there_is_said_in_a_line(server, memory, packed):
    gone = f"{server.address}/gone"
    with pytest.raises(UserError, match=rf"data\.root: {gone}/train: no split of a pack; make one"):
        load_dataset(options(gone), "train")
    fsspec.filesystem("memory").rm("/pack/train/00001.tar")
    with pytest.raises(UserError, match=r"memory://pack/train/00001\.tar: no such file; check the"):
        load_dataset(options(memory), "train")
    fsspec.filesystem("memory").pipe("/pack/train/00001.tar", b"short")
    with pytest.raises(UserError, match=r"00001\.tar: has 5 bytes and the index says [\d,]+; copy"):
        load_dataset(options(memory), "train")


def test_a_server_that_cannot_be_reached():
    with pytest.raises(UserError) as raised:
        load_dataset(options("http://127.0.0.1:9/pack"), "train")
    line = str(raised.value)
    assert line.startswith("data.root: http://127.0.0.1:9/pack/train/index.json: ClientConnector")
    assert line.endswith("; check the address, the network and your credentials")
    assert "\n" not in line


def test_a_server_that_is_gone_in_the_run(server):
    data = load_dataset(options(server.address), "train")
    server.ranges = False
    says = (
        r"^data\.root: http://.*/train/0000\d\.tar: record \d+ .*: cannot be read \([\d,]+ bytes "
    )
    with pytest.raises(RankFailure, match=says + r"came for [\d,]+; does the server know ranges\?"):
        list(Loader(data, 10, 0, torch.device("cpu")).epoch(0))
    shutil.move(server.folder / "train", server.folder / "away")
    try:
        with pytest.raises(
            RankFailure, match=r"cannot be read \(.*\).* files read\); check the add"
        ):
            list(Loader(data, 10, 0, torch.device("cpu")).epoch(0))
    finally:
        shutil.move(server.folder / "away", server.folder / "train")


def test_a_store_that_nothing_is_known_of(monkeypatch):
    monkeypatch.setitem(
        known_implementations,
        "sss",
        {"class": "no_such_package.FileSystem", "err": "Install no_such_package for sss"},
    )
    for root, says in (
        ("sss://bucket/pack", "Install no_such_package for sss; pip install no_such_package$"),
        ("nosuch://bucket/pack", "Protocol not known: nosuch; check the address"),
    ):
        with pytest.raises(UserError, match=rf"^data\.root: {root}: \w+Error: {says}"):
            load_dataset(options(root), "train")


def test_what_is_mapped_cannot_lie_in_a_store(packed, tmp_path):
    run_pack(packed.parent / "images", tmp_path / "raw", How(raw=True, size=16))
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "raw"), "/raw", recursive=True)
    with pytest.raises(UserError, match=r"memory://raw/train: is a pack of pixels, which are mapp"):
        load_dataset(options("memory://raw"), "train")
    store.rm("/raw", recursive=True)
    for name in ("imagefolder", "cifar10"):
        with pytest.raises(UserError, match="of what lies in a store packs alone are read"):
            load_dataset(DataOptions(name=name, root="memory://raw"), "train")


def test_the_address_may_be_in_the_environment(memory, monkeypatch):
    monkeypatch.setenv("DIST_ADV_DATA", f"{memory}/")
    assert len(load_dataset(DataOptions(name="packed", size=16), "test")) == 12
    assert str(open_store(f"{memory}/") / "test") == "memory://pack/test"


@pytest.mark.parametrize("store", ["memory", "server"], indirect=True)
def test_doctor_reads_every_byte(store, request, packed):
    def look(root: str) -> Any:
        found = examine(DIGITS, ["data.name=packed", f"data.root={root}"], Path("runs"))
        return next(each for each in found if each.what == "data")

    good = look(store)
    assert (good.level, good.found) == ("ok", f"packed in {store}, every byte as it was packed")
    if store.startswith("memory"):
        name = "/pack/test/00000.tar"
        content = bytearray(fsspec.filesystem("memory").cat_file(name))
        content[700] ^= 1
        fsspec.filesystem("memory").pipe(name, bytes(content))
        bad = look(store)
        assert bad.level == "problem"
        assert "memory://pack/test/00000.tar: is not what was packed" in bad.found
        with pytest.raises(UserError, match="is not what was packed"):
            check_pack(open_store(store) / "test")
    assert look("http://127.0.0.1:9/pack").level == "problem"


def test_doctor_knows_a_server_without_ranges(server, packed):
    server.ranges = False
    found = examine(DIGITS, ["data.name=packed", f"data.root={server.address}"], Path("runs"))
    data = next(each for each in found if each.what == "data")
    assert data.level == "problem"
    assert "does the server know ranges?" in data.found
