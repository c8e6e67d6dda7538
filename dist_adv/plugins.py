"""Other people's code that a configuration names: Python references, and installed packages.

`mine:MyMethod` is the object MyMethod of the module `mine`, looked for in the working directory,
too. Without a colon a name is dist_adv's own or else an entry point of an installed package.
Nothing is imported but what the user's configuration names.
"""

import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch

from dist_adv.options import Options
from dist_adv.text import nearest, said

_GIVEN = "given:"


@dataclass(frozen=True)
class _Found:
    """Somebody's object, the files of the source that it comes from, and a hash of them."""

    thing: Any
    files: tuple[Path, ...] = ()
    source: str = ""


_FOUND: dict[tuple[str, str], _Found] = {}


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of installed packages, such as those of `dist_adv.methods`."""
    return {point.name: point for point in entry_points(group=group)}


def find(name: str, group: str, own: Mapping[str, Any], may_import: bool = True) -> Any:
    """Return what a name in a configuration stands for.

    group: of the entry points. own: what dist_adv has, by its names. may_import: false for a name
    that no configuration of the user's gave, but a file: what is imported already is taken.

    Raises ValueError saying why there is no such thing, with the nearest name, or where its code
    fails.
    """
    if name in own:
        return own[name]
    if (group, name) not in _FOUND:
        if name.startswith(_GIVEN):
            raise ValueError(
                f"{name!r} was given in Python; give it again: dist_adv.train, dist_adv.evaluate"
            )
        known = installed(group)
        if ":" not in name and name not in known:
            raise ValueError(f"{name!r} is not known{nearest(name, [*own, *known])}")
        reference = name if ":" in name else known[name].value
        module = reference.partition(":")[0]
        if not may_import and module not in sys.modules:
            raise ValueError(f"{name!r} is not imported for a file; 'import {module}' first")
        thing = _imported(name, reference)
        _FOUND[group, name] = _found(thing, module)
    return _FOUND[group, name].thing


def refer(thing: Any, group: str) -> str:
    """Return the reference of an object of this program, by which `find` has it from now on."""
    name = f"{thing.__module__}:{thing.__qualname__}"
    _FOUND[group, name] = _found(thing, thing.__module__)
    return name


def give(name: str, group: str, thing: Any) -> str:
    """Return a name for an object that a program gives, by which `find` has it in this process."""
    _FOUND[group, f"{_GIVEN}{name}"] = _Found(thing)
    return f"{_GIVEN}{name}"


def sources(names: Iterable[str]) -> dict[str, str]:
    """Return the hashes of the sources of those of these names that are somebody else's."""
    wanted = set(names)
    return {
        name: found.source
        for (_, name), found in _FOUND.items()
        if name in wanted and not name.startswith(_GIVEN)
    }


def _imported(name: str, reference: str) -> Any:
    module, _, path = reference.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # the script `dist-adv` has its own folder there instead
    try:
        return reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:
        raise ValueError(f"{name!r} cannot be imported ({told(error)})") from error


def options_of(name: str, thing: Any, base: type[Options]) -> type[Any]:
    """Return the class of an object's options, its attribute `Options`.

    Raises ValueError where it has none.
    """
    options = getattr(thing, "Options", None)
    if not (isinstance(options, type) and issubclass(options, base)):
        raise ValueError(
            f"{name!r} has no options; give it an attribute Options, a class of "
            f"dist_adv.{base.__name__}"
        )
    return options


def told(error: Exception) -> str:
    """Return an error of somebody else's code on one line: file, line, kind and text."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {said(error)}"
    others = (str(Path(__file__).parent), str(Path(torch.__file__).parent), "<")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(others) and "importlib" not in frame.filename
    ]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{said(error)}"


def blamed(error: BaseException) -> str:
    """Return `file, line n: ` of what was found, where an error came through it; else nothing.

    A reference to something of dist_adv's makes nothing of dist_adv somebody's own.
    """
    own = Path(__file__).parent
    files = {
        str(file)
        for found in _FOUND.values()
        for file in found.files
        if not file.is_relative_to(own)
    }
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""


def _found(thing: Any, name: str) -> _Found:
    """Return an object with the source of the module that has it: its file, or its package."""
    digest = hashlib.sha256()
    module = sys.modules.get(name.partition(".")[0])
    folders = [Path(folder) for folder in getattr(module, "__path__", [])]
    # Without the hidden ones, which editors and notebooks leave there.
    files = sorted(
        path
        for folder in folders
        for path in folder.rglob("*.py")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files and getattr(module, "__file__", None):
        files = [Path(module.__file__)]  # type: ignore[union-attr, arg-type]
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    if not files:  # typed at a prompt or in a notebook
        with suppress(OSError):
            digest.update(inspect.getsource(thing).encode())
    return _Found(thing, tuple(files), digest.hexdigest()[:12])
