"""How the end of a run is recorded, whatever ended it."""

import json
from pathlib import Path

import pytest

from dist_adv.config import load_config
from dist_adv.training.run import train_run
from launch import TINY

DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"


def test_a_failure_that_nobody_foresaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: object
) -> None:
    """It is no reason to leave `running` behind, which would mean that the run was killed.

    And no fault of somebody's own code, where a reference leads to dist_adv's.
    """

    def fail(*_: object) -> None:
        raise ValueError("unforeseen")

    monkeypatch.setattr("dist_adv.training.trainer.Trainer.fit", fail)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ours = [*TINY, "method.name=dist_adv.methods.fast:Fast"]
    with pytest.raises(ValueError, match="unforeseen"):
        train_run(load_config(DIGITS, ours), tmp_path / "run", "auto")
    found = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (found["state"], found["reason"]) == ("failed", "unforeseen")
