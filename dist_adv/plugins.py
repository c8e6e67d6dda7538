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
from collections.abc import Mapping
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from dist_adv.text import nearest, one_line

_IN_PROGRAM: dict[str, Any] = {}


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of installed packages, such as those of `dist_adv.methods`."""
    return {point.name: point for point in entry_points(group=group)}


def find(name: str, group: str, own: Mapping[str, Any]) -> Any:
    """Return what a name in a configuration stands for.

    group: of the entry points. own: what dist_adv has by its names.

    Raises ValueError saying why there is no such thing, with the nearest name, or where its code
    fails.
    """
    if name in own:
        return own[name]
    if name in _IN_PROGRAM:
        return _IN_PROGRAM[name]
    if ":" in name:
        return _imported(name, name)
    if name in installed(group):
        return _imported(name, installed(group)[name].value)
    raise ValueError(f"{name!r} is not known{nearest(name, [*own, *installed(group)])}")


def refer(thing: Any) -> str:
    """Return the reference of an object of this program, by which `find` has it from now on."""
    name = f"{thing.__module__}:{thing.__qualname__}"
    _IN_PROGRAM[name] = thing
    return name


def _imported(name: str, reference: str) -> Any:
    module, _, path = reference.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # the script `dist-adv` has its own folder there instead
    try:
        return reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:
        raise ValueError(
            f"{name!r} cannot be imported ({place(error)}{one_line(error)})"
        ) from error


def place(error: BaseException) -> str:
    """Return `file, line n: ` of the code that raised an error, where it is somebody else's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    own = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((own, "<")) and "importlib" not in frame.filename
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""


def fingerprint(thing: Any) -> str:
    """Return a hash of the source that defines an object: its file, or its whole package."""
    digest = hashlib.sha256()
    module = sys.modules.get(thing.__module__.partition(".")[0])
    folders = [Path(folder) for folder in getattr(module, "__path__", [])]
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    if not files and getattr(module, "__file__", None):
        files = [Path(module.__file__)]  # type: ignore[union-attr, arg-type]
    if not files:  # typed at a prompt
        digest.update(inspect.getsource(thing).encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]
