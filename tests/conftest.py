"""Fixtures for all tests."""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

import forked
from cases import make_images

TESTS = Path(__file__).parent
# Folders whose tests start processes, the longest first; files of others are quick.
LONG = ("parity", "resume", "distributed", "faults", "cli", "launch", "track", "slurm", "browser")
SLOW = ("parity", "resume")
KINDS = {
    **dict.fromkeys(("cli", "faults", "launch", "track"), "process"),
    **dict.fromkeys(("distributed",), "ranks"),
    **{"slurm": "slurm", "gpu": "gpu", "browser": "browser"},
}

Once = Callable[[str, Callable[[Path], object]], Path]
Trained = Callable[..., Path]


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Say for each test of which kind it is, and which are for one worker: those that share runs,
    by a fixture of their module or as the mark `shares` says.

    Long ones come first, so that no worker is left alone with one in the end. A wrapper, as xdist
    looks at the groups in its own hook, which comes before all that are none.
    """
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in SLOW:
            item.add_marker("slow")
        if (item.get_closest_marker("slow") and folder in KINDS) or folder == "gpu":
            item.add_marker(KINDS[folder])
        shares = item.get_closest_marker("shares")
        if shares or has_fixture_of_module(item):
            values = [str(item.callspec.params[name]) for name in (shares.args if shares else ())]
            item.add_marker(pytest.mark.xdist_group("-".join([item.path.stem, *values])))
    items.sort(key=rank)
    yield


def has_fixture_of_module(item: pytest.Item) -> bool:
    """Whether a test's fixtures are shared within its file; pytest has no public way to ask."""
    known = item._fixtureinfo.name2fixturedefs.values()
    return any(each.scope == "module" for definitions in known for each in definitions)


def rank(item: pytest.Item) -> int:
    """Which comes first; the order within a folder stays."""
    folder = item.path.relative_to(TESTS).parts[0]
    return LONG.index(folder) if folder in LONG else len(LONG)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: the folder that `make` fills, once for all workers, who only read it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker where `make` failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def images(once: Once) -> Path:
    """A small image folder of noise (see `cases.make_images`)."""
    return once("images", make_images)


@pytest.fixture(scope="session")
def trained(once: Once, images: Path) -> Trained:
    """The folder of all cases trained at so many ranks (see `train_all.py`), from the beginning
    or from the `at`-th checkpoint of another such folder.
    """

    def trained(
        ranks: int, norm: str, numbers: str, start: Path | None = None, at: int = 0
    ) -> Path:
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks)]
        command += [str(TESTS / "support" / "train_all.py")]

        def train(out: Path) -> None:
            arguments = [str(out), norm, str(images), numbers]
            arguments += [str(start), str(at)] if start else []
            done = forked.run([*command, *arguments], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]

        name = f"{ranks}-{norm}-{numbers}"
        return once(f"{name}-after-{at}-of-{start.name}" if start else name, train)

    return trained


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's figures are made, and none is drawn: the test looks at something else."""

    def save(figure: object, path: Path) -> None:
        Image.new("RGB", (1, 1)).save(path)

    monkeypatch.setattr("dist_adv.report.figures.album._save", save)


@pytest.fixture
def said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """What the project logs in this test; its messages do not reach the root's handlers."""
    log = logging.getLogger("dist_adv")
    monkeypatch.setattr(log, "propagate", False)
    log.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "dist_adv"):
        yield caplog
    log.removeHandler(caplog.handler)
