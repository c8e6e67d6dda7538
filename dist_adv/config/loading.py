"""From YAML files that extend others and `key.path=value` overrides to a checked configuration."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dist_adv import by_epoch, packages
from dist_adv.config.explain import explain
from dist_adv.config.schema import Config, Judged
from dist_adv.config.yaml_text import parse_yaml
from dist_adv.data.datasets import keys_for_another
from dist_adv.errors import UserError

Kind = TypeVar("Kind", Config, Judged)


def read_mapping(path: Path, needs: str, wanted: str = "") -> dict[str, Any]:
    """Return the mapping that a YAML file holds; `needs` and `wanted` are for the complaint."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = packages.shipped("configs")
        raise UserError(f"{path}: no such configuration file{wanted}; see {known}/") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        raise UserError(f"{path}: is empty; it needs at least {needs!r}")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is no mapping of keys; it needs at least {needs!r}")
    return tree


def _read_file(path: Path, needs: str, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping of a file with everything that it extends."""
    here = Path(os.path.realpath(path))  # Path.resolve raises for a link to itself
    if here in seen:
        raise UserError(f"{path}: extends itself; remove the circle of 'extends'")
    wanted = f" (which {seen[-1]} extends)" if seen else ""
    tree = read_mapping(path, needs, wanted)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: must be one file name, relative to this file")
    return _merge(_read_file(path.parent / base, needs, (*seen, here)), tree)


# Of sections that may leave it out.
_USUAL = {"optim": "sgd"}


def _merge(base: dict[str, Any], top: dict[str, Any], sections: bool = True) -> dict[str, Any]:
    """`top` over `base`, section by section.

    A section with another `name` (another method, model or optimiser) replaces the whole section:
    the keys of a Free method mean nothing to a Fast one. So does whatever takes the place of values
    by epoch. Below sections (`sections` is false) a name is a key like others: track.wandb.name.
    Another data set leaves how its images are used as it is: a recipe for CIFAR-10 is the same
    recipe for a folder.
    """
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if key == "data" and isinstance(old, dict) and isinstance(value, dict) and "name" in value:
            old = keys_for_another(old, str(value["name"])) | {"name": value["name"]}
        merged[key] = value
        if isinstance(old, dict) and isinstance(value, dict) and not by_epoch.has_epochs(old):
            name = old.get("name", _USUAL.get(key)) if sections else None
            if name is None or value.get("name", name) == name:
                merged[key] = _merge(old, value, sections=False)
    return merged


def _overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """`['train.epochs=3']` as a tree."""
    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise UserError(f"{assignment!r} is no override; write key.path=value: train.epochs=3")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}  # what is said later wins
            node = node[parent]
            if not isinstance(node, dict):
                raise UserError(f"{key}: {parent} is set to a single value by another override")
        node.update(_merge(node, {leaf: parse_yaml(text, key)}, sections=not parents))
    return tree


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a file and what it extends, apply `key.path=value` overrides, check everything.

    path: one of `configs/` that is not here is the one that comes with dist_adv; None where the
    overrides say all that differs from the defaults.

    Raises UserError naming the file and the key, with the nearest known name where there is one.
    """
    return load(path, overrides, Config)


def load(path: str | Path | None, overrides: Sequence[str], kind: type[Kind]) -> Kind:
    """Load a configuration of either kind as `load_config` does."""
    tree = _read_file(packages.own_or_shipped(Path(path)), kind.NEEDS) if path else {}
    return parse(_merge(tree, _overrides(overrides)), str(path or "overrides"), kind)


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Check a whole configuration; `source` is named in errors."""
    return parse(tree, source, Config)


def parse(tree: Mapping[str, Any], source: str, kind: type[Kind]) -> Kind:
    """Check a configuration of either kind as `parse_config` does, at every epoch."""
    try:
        found = by_epoch.changes(tree) if kind is Config else {}
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    last = _checked(by_epoch.at_the_end(tree) if found else tree, source, kind)
    if not found or not isinstance(last, Config):
        return last
    stages = {}
    for first in by_epoch.firsts(found):
        now = by_epoch.with_values(tree, by_epoch.at(found, first))
        stages[first] = _checked(now, f"{source}: in epoch {first}", Config)
    late = {key: max(values) for key, values in found.items() if max(values) >= last.train.epochs}
    for key, epoch in late.items():
        raise UserError(
            f"{source}: {key}: changes in epoch {epoch}, counted from 0, and train.epochs is "
            f"{last.train.epochs}; train longer, or leave that out"
        )
    return last.changing(found, stages)


def _checked(tree: Mapping[str, Any], source: str, kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [explain(detail, tree, kind) for detail in error.errors()]
    raise UserError(f"{source}: " + "; ".join(dict.fromkeys(problems)))
