"""What differs between two configurations, and which differences leave training the same."""

import math
from collections.abc import Mapping
from typing import Any

from dist_adv.config.schema import Config, Judged

# Differences in these do not change what is trained, so a run goes on in spite of them. The data
# and the weights of the start may have moved; whether they are the same is not seen from where they
# lie.
_FREE_TO_CHANGE = (
    "track.",
    "eval.",
    "data.root",
    "data.path",
    "data.subset",
    "data.revision",
    "data.extra.path",
    "data.resident_gb",
    "data.workers",
    *(
        f"train.{key}"
        for key in (
            "deterministic",
            "keep",
            "log_every",
            "max_minutes",
            "on_nan",
            "save_minutes",
            "save_steps",
        )
    ),
    *(f"train.{key}" for key in ("skip_limit", "start", "threads", "timeout_minutes")),
)
# More of these is a longer run; less is another one.
_FREE_TO_GROW = ("train.epochs", "train.max_steps")


def differences(old: Config | Judged, new: Config | Judged) -> list[str]:
    """`key: old -> new` for every key that is not the same."""
    before, after = flatten(old.model_dump()), flatten(new.model_dump())
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def longer(old: Config, new: Config) -> list[str]:
    """Return the differences by which a run gets longer; what is trained is the same until then."""
    before, after = flatten(old.model_dump()), flatten(new.model_dump())
    # null: no limit
    grown = [key for key in _FREE_TO_GROW if _limit(after[key]) > _limit(before[key])]
    return [line for line in differences(old, new) if line.split(":")[0] in grown]


def training_differences(old: Config, new: Config) -> list[str]:
    """Return the differences that change what is trained."""
    allowed = longer(old, new)
    return [
        line
        for line in differences(old, new)
        if line not in allowed and not line.startswith(_FREE_TO_CHANGE)
    ]


def _limit(value: int | None) -> float:
    return math.inf if value is None else value


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """`{'train.epochs': 3}` for `{'train': {'epochs': 3}}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
