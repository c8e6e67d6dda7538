"""Where a run's numbers go: metrics.jsonl and results.jsonl always, W&B and TensorBoard as views.

Main process only. The files in the run folder are the record; nothing that goes wrong with a
dashboard stops a run.
"""

import difflib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save

from dist_adv import records
from dist_adv.config import Config
from dist_adv.errors import UserError
from dist_adv.evaluate import Examples, Result

log = logging.getLogger("dist_adv")


_MODES = ("auto", "online", "offline", "disabled")


def check(config: Config) -> None:
    """Raises UserError for what would keep a Tracker from starting, before anything is written."""
    mode = os.environ.get("WANDB_MODE", "auto")
    if mode not in _MODES:
        near = difflib.get_close_matches(mode, _MODES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(_MODES)}"
        raise UserError(f"WANDB_MODE: {mode!r} in the environment is not known; {hint}")
    if config.track.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "track.tensorboard: tensorboard is not installed; pip install 'dist-adv[tensorboard]'"
        )


class Tracker:
    """Records of one run. `wandb_id` of an earlier part of the run goes on as the same run."""

    def __init__(self, run_dir: Path, config: Config, wandb_id: str | None = None) -> None:
        self.run_dir = run_dir
        records.drop_torn_line(run_dir / "metrics.jsonl")
        self.wandb = _start_wandb(run_dir, config, wandb_id)
        self.wandb_id: str | None = self.wandb.id if self.wandb else wandb_id
        self.tensorboard = _start_tensorboard(run_dir) if config.track.tensorboard else None

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; `kind` is `train` (a logged step) or `epoch`."""
        records.append(self.run_dir / "metrics.jsonl", record)
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        named = {f"{record['kind']}/{key}": value for key, value in numbers.items()}
        with self._views():
            if self.wandb:
                self.wandb.log({**named, "step": record["step"], "epoch": record["epoch"]})
            if self.tensorboard:
                for name, value in named.items():
                    self.tensorboard.add_scalar(name, value, record["step"])

    def results(self, results: Sequence[Result], examples: Examples | None) -> None:
        """The final figures on the dashboards; `write_results` keeps the record."""
        with self._views():
            for result in results:
                if self.wandb:
                    self.wandb.summary[f"final/{result.attack}"] = result.accuracy
                if self.tensorboard:
                    self.tensorboard.add_scalar(f"final/{result.attack}", result.accuracy)
            if self.wandb and examples:
                self.wandb.log({f"examples/{examples.attack}": _table(examples)})

    def finish(self, status: int = 0) -> None:
        """Flush everything; the run may not be used afterwards. status: as of the process."""
        with self._views():
            if self.tensorboard:
                self.tensorboard.close()
            if self.wandb:
                import wandb

                self.wandb.finish(exit_code=status)
                wandb.teardown()  # `finish` returns before the last records are in the file

    @contextmanager
    def _views(self) -> Iterator[None]:
        """A dashboard that fails is given up, aloud: W&B's helper process may have been killed."""
        try:
            yield
        except Exception as error:  # whatever a dashboard's client comes up with
            log.warning("dashboards are given up (%s); metrics.jsonl goes on", error)
            self.wandb = self.tensorboard = None


def write_results(
    run_dir: Path, results: Sequence[Result], examples: Examples | None, about: Mapping[str, Any]
) -> None:
    """The pictures in examples.safetensors, then lines of results.jsonl: what is there is done."""
    if examples:
        names = ("clean", "adversarial", "label", "clean_prediction", "adversarial_prediction")
        tensors = {name: getattr(examples, name).contiguous() for name in names}
        metadata = {"attack": examples.attack, "classes": json.dumps(examples.classes)}
        records.replace(run_dir / "examples.safetensors", save(tensors, metadata))
    records.drop_torn_line(run_dir / "results.jsonl")
    for result in results:
        records.append(run_dir / "results.jsonl", {**result.record(), **about})


def _table(examples: Examples) -> Any:
    """A W&B table of images before and after the attack, with the predictions."""
    import wandb

    table = wandb.Table(columns=["image", "adversarial", "label", "predicted", "attacked"])
    answers = (examples.label, examples.clean_prediction, examples.adversarial_prediction)
    for i in range(len(examples.label)):
        pictures = [
            wandb.Image((images[i] * 255).byte().permute(1, 2, 0).numpy().squeeze())
            for images in (examples.clean, examples.adversarial)
        ]
        table.add_data(*pictures, *(examples.classes[int(answer[i])] for answer in answers))
    return table


def _start_wandb(run_dir: Path, config: Config, wandb_id: str | None) -> Any:
    """A W&B run, offline where nobody is logged in or the server is out of reach; or None."""
    options = config.track.wandb
    mode = os.environ.get("WANDB_MODE", options.mode)
    if mode == "disabled":
        return None
    import wandb

    def start(mode: Any) -> Any:
        run = wandb.init(
            dir=run_dir,
            project=options.project,
            entity=options.entity,
            name=options.name or run_dir.name,
            group=options.group,
            tags=options.tags or [config.method.name, config.data.name, config.model.name],
            config=config.model_dump(),
            id=wandb_id,
            resume="allow" if wandb_id else None,
            mode=mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                # Long enough for a slow network; W&B's own 90 s are long for a run that waits.
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", "30")),
            ),
        )
        # Points are placed by these and not by W&B's own counter, which drops what a resumed
        # run logs again.
        run.define_metric("train/*", step_metric="step")
        run.define_metric("epoch/*", step_metric="epoch")
        return run

    try:
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        return start(mode)
    except (wandb.Error, OSError) as error:
        log.warning("W&B is out of reach (%s): recording offline in %s/wandb", error, run_dir)
        return start("offline")


def _start_tensorboard(run_dir: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run_dir / "tensorboard")
