"""Packages that not every run uses: which are installed, and what to do about one that is not."""

import importlib.metadata
import importlib.util

from dist_adv.errors import UserError


def version(name: str) -> str | None:
    """Return the version of an installed distribution, None where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def need(module: str, asked: str, install: str) -> None:
    """Raise UserError where `asked`, a key or a command, needs a module that is not installed.

    install: what pip takes for it. Nothing is imported.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{asked}: {module} is not installed; pip install {install}")
