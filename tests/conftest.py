"""Fixtures for all tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cases import make_images


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
