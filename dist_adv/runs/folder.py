"""The folder of a run: its files by name, its lock, its state. Nothing here needs torch."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dist_adv import files
from dist_adv.runs.lock import Lock, held

State = Literal["running", "preempted", "failed", "done"]


class RunFolder:
    """Every file that a run writes or heeds. Printed and passed to `open`, it is its path.

    weights: of the finished run; its being there means that training is over. judged: in a folder
    of somebody's network in place of a run, what was measured of it. thorough: whether robust
    accuracy is to be believed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.environment = path / "config.yaml", path / "env.json"
        self.status, self.log = path / "status.json", path / "log.txt"
        self.metrics, self.results = path / "metrics.jsonl", path / "results.jsonl"
        self.judged, self.thorough = path / "judged.yaml", path / "thorough.json"
        self.claim = path / "claim.json"
        self.weights, self.examples = path / "model.safetensors", path / "examples.safetensors"
        self.checkpoints = path / "checkpoints"
        self.identity = path / "wandb" / "run.json"

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def lock(self, option: str = "--run-dir") -> Lock:
        """Take the folder for this process. Raises UserError where another one has it."""
        return Lock(self.path, option)

    def held(self) -> bool | None:
        """Tell whether a process has the folder; None where that cannot be seen."""
        return held(self.path)

    def mark(self, state: State, **about: Any) -> None:
        """Write status.json: what became of the run. `running` without a lock: it was killed.

        Raises RunFailure where the disk refuses.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"state": state, **about, "time": now})
        files.replace(self.status, line.encode())

    @property
    def state(self) -> State | None:
        """What status.json says; None where it says nothing."""
        try:
            return json.loads(self.status.read_text())["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def weights_of_shorter_run(self, step: int) -> Path:
        """Where the final weights of a run of `step` steps are kept when it is made longer."""
        return self.path / f"model-step-{step:09d}.safetensors"
