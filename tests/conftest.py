"""Fixtures for all tests."""

from pathlib import Path

import pytest

from cases import make_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image folder of noise (see `cases.make_images`)."""
    root = tmp_path_factory.mktemp("images")
    make_images(root)
    return root
