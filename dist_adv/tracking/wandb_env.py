"""W&B's environment variables: what they ask for, checked before anything starts.

Those that a run is known by are read here and hidden from W&B (`hidden`), which refuses
WANDB_MODE=auto, tags such as `a,,b`, and any variable that is set to nothing (wandb 0.31).
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_adv.errors import UserError
from dist_adv.text import nearest

# Each goes before the key: it belongs to this launch, the configuration to all of them.
_KEYS = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "notes": "WANDB_NOTES",
}
_READ_HERE = ("WANDB_MODE", "WANDB_TAGS", "WANDB_RUN_ID", "WANDB_INIT_TIMEOUT", *_KEYS.values())
_MODES = ("auto", "online", "offline", "disabled")
_OLD_MODES = {"run": "online", "dryrun": "offline"}  # W&B still takes these names
_YES = ("1", "on", "t", "true", "y", "yes")


def check() -> None:
    """Raise UserError naming the first variable whose value means nothing."""
    mode(), tags(), run_id(), init_timeout()


def mode(otherwise: str = "auto") -> str:
    """Return auto, online, offline or disabled: `otherwise` where no variable says it."""
    said = _value("WANDB_MODE").lower()
    if not said:
        # W&B itself no longer heeds this one; who sets it means it.
        return "disabled" if _value("WANDB_DISABLED").lower() in _YES else otherwise
    found = _OLD_MODES.get(said, said)
    if found not in _MODES:
        hint = nearest(said, _MODES)
        raise UserError(f"WANDB_MODE: {said!r} in the environment is not known{hint}")
    return found


def keys() -> dict[str, Any]:
    """Return the keys of track.wandb that variables set, but for `mode`."""
    said: dict[str, Any] = {key: _value(name) for key, name in _KEYS.items() if _value(name)}
    return said | ({"tags": tags()} if tags() else {})


def tags() -> list[str]:
    """Return those of WANDB_TAGS, which has commas between them."""
    found = [tag.strip() for tag in _value("WANDB_TAGS").split(",") if tag.strip()]
    for tag in found:
        if len(tag) > 64:
            raise UserError(
                f"WANDB_TAGS: a tag in the environment has {len(tag)} characters ({tag[:20]}...); "
                "W&B takes 64, and commas between tags"
            )
    return found


def run_id() -> str | None:
    """Return the id that WANDB_RUN_ID asks for."""
    found = _value("WANDB_RUN_ID")
    if any(character in ":;,#?/'" for character in found):
        raise UserError(
            f"WANDB_RUN_ID: {found!r} in the environment; W&B takes none of : ; , # ? / '"
        )
    return found or None


def init_timeout() -> float:
    """Return how many seconds a run waits for the server before it goes on offline."""
    # Long enough for a slow network; W&B's own 90 s are long for a run that waits.
    said = _value("WANDB_INIT_TIMEOUT") or "30"
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"WANDB_INIT_TIMEOUT: {said!r} in the environment is no number of seconds")
    return seconds


def refuse_one_id_for_many(runs: int) -> None:
    """Raise UserError where WANDB_RUN_ID would make several runs one run on W&B."""
    if runs > 1 and _value("WANDB_RUN_ID"):
        raise UserError(
            f"WANDB_RUN_ID: is the id of one run, and these are {runs}; unset it, and each has "
            "its own"
        )


@contextmanager
def hidden() -> Iterator[None]:
    """Keep from W&B meanwhile what is read here, and what is set to nothing."""
    empty = [name for name in os.environ if name.startswith("WANDB_") and not _value(name)]
    kept = {name: os.environ.pop(name) for name in {*_READ_HERE, *empty} if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _value(name: str) -> str:
    """Return the value of a variable without space around it, '' where it is not set."""
    return os.environ.get(name, "").strip()
