"""Step times on disk: what earlier measurements say, and what a plan keeps."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_adv.bench.timing import network
from dist_adv.config import Config
from dist_adv.errors import UserError
from dist_adv.methods import find_method
from dist_adv.plan.measure import Images
from dist_adv.plan.model import Row


def _label(config: Config) -> str:
    """Return the method's name in benchmarks: PGD-7, Fast; and AWP, which none of them has."""
    steps = getattr(config.method, "steps", None)
    title = find_method(config.method.name).title + (f"-{steps}" if steps else "")
    return f"{title} with AWP" if config.awp else title


_CASE = re.compile(r"([^,]+?)(?: step| replay| m=\d+)?, (\w+), batch (\d+), compile (\w+)")


def _cases(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, int, float]]:
    """Yield (method, precision, compile, batch size, seconds) of each step time of a record."""
    for row in rows:
        timed = {**row, **row.get("details", {})}
        case = _CASE.fullmatch(timed["what"])
        if case and "step_ms" in timed:
            method, precision, batch, compile_ = case.groups()
            if not (int(batch) and 0 < timed["step_ms"] < math.inf):
                raise ValueError(timed["step_ms"])
            yield method, precision, compile_, int(batch), timed["step_ms"] / 1000


def read_step_times(
    path: Path, config: Config, images: Images
) -> tuple[dict[int, float], dict[str, Any]]:
    """Return step times of this method, precision and network, from `bench.json`, part b of
    `benchmarks/gpu_suite.py`, or `plan --json`; and what the record says of itself.

    Raises UserError for a file that is none of these, or lacks the case.
    """
    try:
        record = json.loads(path.read_text())
        cases, measured = list(_cases(record["rows"])), record["network"]
    except OSError as error:
        raise UserError(f"--step-times: {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"--step-times: {path}: holds no step times; use bench.json of dist-adv bench, b.json "
            f"of benchmarks/gpu_suite.py, or a file of dist-adv plan --json"
        ) from None
    wanted = network(config.model, images.size)
    if measured != wanted:
        raise UserError(f"--step-times: {path}: was measured with {measured}, not with {wanted}")
    label, train = _label(config), config.train
    found = [
        case for case in cases if case[0].lower() == label.lower() and case[2] == train.compile
    ]
    order = ("bf16", "fp16", "fp32") if train.precision == "auto" else (train.precision,)
    for precision in order:
        points = {batch: seconds for _, p, _, batch, seconds in found if p == precision}
        if points:
            return points, {**record, "precision": precision}
    there = sorted(
        {f"{method} {precision} {compile_}" for method, precision, compile_, *_ in cases}
    )
    raise UserError(
        f"--step-times: {path}: has no {label} in train.precision={train.precision} with "
        f"train.compile={train.compile}; it has {', '.join(there) or 'none'}"
    )


def plan_record(
    config: Config,
    images: Images,
    points: Mapping[int, float],
    source: Mapping[str, Any],
    rows: Sequence[Row],
) -> dict[str, Any]:
    keys = ("hardware", "precision", "torch", "date", "commit")
    case = f"{_label(config)}, {source.get('precision', config.train.precision)}"
    return {
        **{key: source[key] for key in keys if key in source},
        "network": network(config.model, images.size),
        "rows": [
            {
                "what": f"{case}, batch {batch}, compile {config.train.compile}",
                "step_ms": 1000 * seconds,
            }
            for batch, seconds in points.items()
        ],
        "plan": [asdict(row) for row in rows],
    }
