"""Debian's Chromium without a window, for as long as its tests take."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

import debian_packages


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    debian_packages.need("chromium", "chromium")
    # As root it refuses to start in its sandbox; the pages are the tests' own.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()
