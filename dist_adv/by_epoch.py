"""Values that change from epoch to epoch: `data.size: {0: 128, 6: 224, 12: 288}`.

A mapping of epochs, counted from 0, in the place of a value. The configuration itself has the last
one, which is what a network is judged by; `Config.stages` has each part of the run.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dist_adv.errors import UserError
from dist_adv.text import pixels

KEYS = (
    "data.size",
    "data.shorter",
    "train.batch_size",
    "threat.eps",
    "method.steps",
    "method.alpha",
)

Changes = dict[str, dict[int, Any]]
"""By key: from which epoch on it has which value."""


def has_epochs(value: object) -> bool:
    """Tell whether a mapping is of numbers of epochs and not of keys; in JSON these are text."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(str(key).replace(".", "", 1).isdecimal() for key in value)
    )


def changes(tree: Mapping[str, Any]) -> Changes:
    """Return what a configuration says by epoch.

    Raises UserError where nothing is said of the beginning, or keys are no epochs.
    """
    found = {}
    for key, value in _values(tree):
        if not isinstance(value, Mapping):
            continue
        if not value or not all(str(epoch).isdecimal() for epoch in value):
            raise UserError(
                f"{key}: {{{_text(value)}}} is not by epoch, a whole number counted from 0; write "
                f"for example {key}={{0: ..., 6: ...}}"
            )
        found[key] = {int(epoch): value[epoch] for epoch in sorted(value, key=int)}
        if 0 not in found[key]:
            raise UserError(f"{key}: say what it is at first: {key}={{0: ..., {_text(value)}}}")
    return found


def _text(value: Mapping[Any, Any]) -> str:
    return ", ".join(f"{epoch}: {each}" for epoch, each in value.items())


def _values(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in KEYS:
        section, name = key.split(".")
        if isinstance(tree.get(section), Mapping) and name in tree[section]:
            yield key, tree[section][name]


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's tree with these values at their keys."""
    changed = dict(tree)
    for key, value in values.items():
        section, name = key.split(".")
        changed[section] = {**changed[section], name: value}
    return changed


def told(found: Changes, first: int) -> str:
    """Return what changes in an epoch, as it is typed: data.size=224, threat.eps=4/255."""
    now = {key: values[first] for key, values in found.items() if first in values}
    return ", ".join(
        f"{key}={pixels(value) if isinstance(value, float) else value}"
        for key, value in now.items()
    )


def at(found: Changes, epoch: int) -> dict[str, Any]:
    """Return each key's value in an epoch."""
    return {key: values[max(e for e in values if e <= epoch)] for key, values in found.items()}


def at_the_end(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's tree with the last value of whatever is by epoch."""
    found = changes(tree)
    return with_values(tree, {key: values[max(values)] for key, values in found.items()})


def firsts(found: Changes) -> list[int]:
    """Return the epochs in which something changes, and 0."""
    return sorted({0}.union(*found.values()))
