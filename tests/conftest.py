"""Fixtures for all tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cases import make_images

TESTS = Path(__file__).parent
# Folders whose tests start processes, the longest first; files of others are quick.
LONG = ("parity", "resume", "distributed", "faults", "cli", "launch", "track", "slurm")
SLOW = ("parity", "resume")
KINDS = {
    **dict.fromkeys(("cli", "faults", "launch", "track"), "process"),
    **dict.fromkeys(("distributed",), "ranks"),
    **{"slurm": "slurm", "gpu": "gpu"},
}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Say for each test of which kind it is, and which are for one worker: those that share runs.

    Long ones come first, so that no worker is left alone with one in the end. A wrapper, as xdist
    looks at the groups in its own hook, which comes before all that are none.
    """
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in SLOW:
            item.add_marker("slow")
        if (item.get_closest_marker("slow") and folder in KINDS) or folder == "gpu":
            item.add_marker(KINDS[folder])
        if folder in LONG:
            shares = item.get_closest_marker("shares")
            values = [str(item.callspec.params[name]) for name in (shares.args if shares else ())]
            item.add_marker(pytest.mark.xdist_group("-".join([item.path.stem, *values])))
    items.sort(key=rank)
    yield


def rank(item: pytest.Item) -> int:
    """Which comes first; the order within a folder stays."""
    folder = item.path.relative_to(TESTS).parts[0]
    return LONG.index(folder) if folder in LONG else len(LONG)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image folder of noise (see `cases.make_images`)."""
    root = tmp_path_factory.mktemp("images")
    make_images(root)
    return root


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
