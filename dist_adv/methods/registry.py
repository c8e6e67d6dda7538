"""Which methods there are: those in the files of this folder, and whatever a reference names."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import SerializeAsAny

from dist_adv import plugins
from dist_adv.methods.base import Method, MethodOptions, Task
from dist_adv.options import Open

GROUP = "dist_adv.methods"


@cache
def own_methods() -> dict[str, type[Method[Any]]]:
    """Return dist_adv's methods by their names in a configuration."""
    return {each.Options.model_fields["name"].default: each for each in _defined_here()}


def _defined_here() -> Iterator[type[Method[Any]]]:
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"{__package__}.{file.name}")
        for each in vars(module).values():
            if _is_method(each) and each.__module__ == module.__name__:
                yield each


def _is_method(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Method) and not inspect.isabstract(thing)


def find_method(name: str) -> type[Method[Any]]:
    """Return the class of a method: dist_adv's own, a package's, or that of a reference.

    Raises ValueError where there is none, saying why.
    """
    found = plugins.find(name, GROUP, own_methods())
    if not _is_method(found):
        raise ValueError(f"{name!r} is no method; write class Mine(dist_adv.Method[MineOptions])")
    plugins.options_of(name, found, MethodOptions)
    return found


def build_method(options: MethodOptions, task: Task) -> Method[Any]:
    """Return the method that the options describe, with nothing carried yet."""
    return find_method(options.name)(options, task)


MethodChoice = Annotated[
    SerializeAsAny[MethodOptions],
    Open(
        lambda: {name: each.Options for name, each in own_methods().items()},
        lambda name: find_method(name).Options,
    ),
]
"""The section `method` of a configuration."""
