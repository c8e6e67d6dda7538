"""Where a run's numbers go: metrics.jsonl and results.jsonl always, W&B and TensorBoard as views.

Main process only. The files in the run folder are the record; nothing that goes wrong with a
dashboard stops a run.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import save

from dist_adv import files, packages, plugins
from dist_adv.config import Config
from dist_adv.config.schema import TRACKER_GROUP
from dist_adv.evaluation.results import Examples, Result
from dist_adv.runs.folder import RunFolder
from dist_adv.tracking import wandb_env, wandb_run
from dist_adv.tracking.wandb_run import caption, final, named, picture

if TYPE_CHECKING:
    from dist_adv.runs.run import Run


log = logging.getLogger("dist_adv")


def check_tracking(config: Config) -> None:
    """Raise UserError for what would keep a Tracker from starting, before anything is written."""
    mode = wandb_env.mode(config.track.wandb.mode)
    if mode != "disabled":
        wandb_env.check()
    if mode in ("online", "offline"):  # `auto` does without
        packages.need("wandb", "track.wandb.mode", "wandb, or set it to disabled")
    if config.track.tensorboard:
        packages.need("tensorboard", "track.tensorboard", "'dist-adv[tensorboard]'")


class Tracker:
    """Records of one run. `wandb_id` of an earlier part of the run goes on as the same run.

    step: from where the run goes on; TensorBoard hides what lies beyond. started_from: the W&B id
    of another run, from a checkpoint of which this one starts.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        wandb_id: str | None = None,
        step: int = 0,
        started_from: str | None = None,
    ) -> None:
        self.run, self.skipped = run, 0
        files.drop_torn_line(run.metrics)
        self.wandb = wandb_run.start(run, config, wandb_id, started_from)
        self.wandb_id: str | None = self.wandb.id if self.wandb else wandb_id
        self.tensorboard: Any = (
            _start_tensorboard(run, config, step) if config.track.tensorboard else None
        )

        self.others: list[Any] = []
        with self._views():
            self.others = [
                other_tracker(name, options, run.path, config.model_dump())
                for name, options in config.track.others.items()
            ]

    def metrics(self, record: Mapping[str, Any], examples: Examples | None = None) -> None:
        """One line of metrics.jsonl; `kind` is `train` (a logged step) or `epoch`.

        examples: of the evaluation whose figures the line has.
        """
        files.append(self.run.metrics, record)
        with self._views():
            image = picture(examples) if examples else None
            if self.wandb:
                self.wandb.metrics(record, image, caption(examples) if examples else "")
            if self.tensorboard:
                for name, value in named(record).items():
                    self.tensorboard.add_scalar(name, value, record["step"])
                if image is not None:
                    self._tensorboard_image("epoch/examples", image, record["step"])
            for other in self.others:
                other.metrics(dict(record))
            self._alert(record)

    def results(self) -> None:
        """Show the final figures on the dashboards; `write_results` keeps the record."""
        if not (self.wandb or self.tensorboard or self.others):
            return
        with self._views():
            run = self._read()
            if self.wandb:
                self.wandb.results(run)
            for other in self.others:
                other.results([dict(each.record) for each in run.evaluations.values()])
            if self.tensorboard:
                for name, accuracy in final(run).items():
                    self.tensorboard.add_scalar(name, accuracy, run.steps)
                if run.examples:
                    self._tensorboard_image("final/examples", picture(run.examples), run.steps)

    def finish(self, status: int = 0, failure: str = "") -> None:
        """Flush everything; the run may not be used afterwards.

        status: as of the process; failure: why it is not 0, for an alert.
        """
        wandb, tensorboard, others = self.wandb, self.tensorboard, self.others
        with self._views():
            if wandb and failure:
                wandb.alert("Run failed", failure)
            if wandb and not status:
                wandb.artifacts(self._read())
        with self._views():
            if tensorboard:
                tensorboard.close()
            if wandb:
                wandb.finish(status)
        with self._views():
            for other in others:
                other.finish(status)

    def _alert(self, record: Mapping[str, Any]) -> None:
        if self.wandb is None:
            return
        where = f"{self.run}, epoch {record['epoch']:g}"
        skipped = record.get("skipped_updates", 0)
        if skipped > self.skipped:
            self.wandb.alert("Not finite", f"{where}: {skipped} updates skipped since this start")
            self.skipped = skipped
        if record.get("guard_tripped"):
            accuracy = f"{record['guard_accuracy']:.1%}"
            text = f"{where}: PGD-5 accuracy on training images fell to {accuracy}"
            self.wandb.alert("Catastrophic overfitting", text)

    def _read(self) -> "Run":
        from dist_adv.runs.run import read_runs

        return read_runs([self.run.path])[0]

    def _tensorboard_image(self, name: str, image: np.ndarray, step: int) -> None:
        self.tensorboard.add_image(name, image, step, dataformats="HWC")

    @contextmanager
    def _views(self) -> Iterator[None]:
        """Give up a dashboard that fails, aloud: W&B's helper process may have been killed."""
        try:
            yield
        except Exception as error:  # whatever a dashboard's client comes up with
            log.warning("dashboards are given up (%s); metrics.jsonl goes on", error)
            self.wandb = self.tensorboard = None
            self.others = []


def other_tracker(
    name: str, options: Mapping[str, Any], run_dir: Path, config: Mapping[str, Any]
) -> Any:
    """Return somebody's own tracker, `kind(options, run_dir, config)`.

    It has `metrics(record)`, called with each line of metrics.jsonl, `results(records)`, with those
    of results.jsonl that count, and `finish(status)`, with the exit status.
    """
    kind = plugins.find(name, TRACKER_GROUP, {})
    return kind(kind.Options.model_validate(dict(options)), run_dir, config)


def write_results(
    run: RunFolder, results: Sequence[Result], examples: Examples | None, about: Mapping[str, Any]
) -> None:
    """Write examples.safetensors, then lines of results.jsonl: what is there is done."""
    if examples:
        names = ("clean", "adversarial", "label", "clean_prediction", "adversarial_prediction")
        tensors = {name: getattr(examples, name).contiguous() for name in names}
        metadata = {"attack": examples.attack, "classes": json.dumps(examples.classes)}
        files.replace(run.examples, save(tensors, metadata))
    files.drop_torn_line(run.results)
    for result in results:
        files.append(run.results, {**result.record(), **about})


def _start_tensorboard(run: RunFolder, config: Config, step: int) -> Any:
    """Return a writer; None, aloud, where it cannot be had: packages that do not fit, a disk."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run.path / "tensorboard", purge_step=step + 1 if step else None)
        writer.add_text("config", f"```yaml\n{config.dump()}```")
        return writer
    except Exception as error:
        log.warning("no TensorBoard (%s); metrics.jsonl is the record", error)
        return None
