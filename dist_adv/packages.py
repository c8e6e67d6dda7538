"""What is installed: packages that not every run uses, and folders that come with this one."""

import importlib.metadata
import importlib.util
from pathlib import Path

from dist_adv.errors import UserError


def version(name: str) -> str | None:
    """Return the version of an installed distribution, None where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def shipped(folder: str) -> Path:
    """Return `configs/` or `launch/`: inside the package, or beside it in a checkout.

    Raises UserError where neither is there.
    """
    package = Path(__file__).parent
    for place in (package / folder, package.parent / folder):
        if place.is_dir():
            return place
    raise UserError(f"{package}: the folder {folder}/ is missing; install dist-adv again")


def own_or_shipped(path: Path) -> Path:
    """Return `path`, or where it is one of configs/ and not here, the one that dist_adv has."""
    if path.parts[:1] != ("configs",) or path.exists():
        return path
    found = shipped("configs").parent / path
    return found if found.exists() else path


def need(module: str, asked: str, install: str) -> None:
    """Raise UserError where `asked`, a key or a command, needs a module that is not installed.

    install: what pip takes for it. Nothing is imported.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{asked}: {module} is not installed; pip install {install}")
