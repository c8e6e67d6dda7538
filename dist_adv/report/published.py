"""The figures of the papers that this project reproduces, from published.yaml."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_adv.errors import UserError
from dist_adv.options import parse_number
from dist_adv.text import nearest

Settings = Mapping[str, Any]

# What no row has unless it says so, and a run may have. Older runs lack some of these keys.
WITHOUT: Settings = {
    "average": None,
    "awp": None,
    "threat.warmup": 0.0,
    "method.attack_mode": "train",
    "train.label_smoothing": 0.0,
    "train.start": None,
    "data.extra": None,
    "data.crop_shift": 0,
    "data.jitter": 0.0,
    "data.erase": 0.0,
    "data.mixup": 0.0,
    "data.cutmix": 0.0,
    "data.randaugment": None,
    "optim.name": "sgd",
    "optim.nesterov": False,
    "optim.decay_norms": True,
    "optim.clip": None,
}

# What published.yaml writes as fractions, by the last part of its key.
IN_PIXELS = ("alpha", "eps", "step_size")


@dataclass(frozen=True, eq=False)
class Row:
    """One experiment: the settings that are known of it, or left out, and what it reached."""

    settings: Settings  # keys of a configuration, such as train.epochs
    percent: Mapping[str, float]  # accuracy by attack
    minutes: float | None
    remark: str

    @property
    def method(self) -> Settings:
        """Its settings of the method, as a run's configuration has them."""
        prefix = "method."
        return {
            key.removeprefix(prefix): value
            for key, value in self.settings.items()
            if key.startswith(prefix)
        }


@dataclass(frozen=True, eq=False)
class Source:
    """A publication. evaluation: what is known of its attacks, with the keys of results.jsonl."""

    title: str
    hardware: str | None
    remark: str
    evaluation: Settings
    rows: Sequence[Row]


def load_published(names: Sequence[str]) -> dict[str, Source]:
    """Return the publications of these names, in order. Raise UserError for an unknown one."""
    with Path(__file__).with_name("published.yaml").open(encoding="utf-8") as file:
        known = yaml.safe_load(file)
    for name in names:
        if name not in known:
            hint = nearest(name, list(known))
            raise UserError(f"--against: nothing published is known as {name!r}{hint}")
    return {name: _source(known[name]) for name in names}


def _source(record: dict[str, Any]) -> Source:
    rows = [
        Row(
            settings={**WITHOUT, **_numbers(record["settings"] | row["settings"])},
            percent=row["percent"],
            minutes=row.get("minutes"),
            remark=row.get("remark", ""),
        )
        for row in record["rows"]
    ]
    return Source(
        title=record["title"],
        hardware=record["hardware"],
        remark=record["remark"],
        evaluation=_numbers(record["evaluation"]),
        rows=rows,
    )


def _numbers(settings: Settings) -> Settings:
    return {
        key: parse_number(value) if key.rpartition(".")[2] in IN_PIXELS else value
        for key, value in settings.items()
    }
