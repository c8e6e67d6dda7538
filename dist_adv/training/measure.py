"""Attacks on the final weights of a run: at its end, and whenever somebody asks for more."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dist_adv import files, packages
from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import Config, differences, load_config, parse_config
from dist_adv.data import Dataset, load_dataset
from dist_adv.distributed.collectives import (
    check_same_images,
    main_process_first,
    on_every,
    on_main,
)
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.start import start_accelerator
from dist_adv.errors import UserError
from dist_adv.evaluation.display import EvaluationDisplay, results_table
from dist_adv.evaluation.evaluate import Supervision, evaluate
from dist_adv.evaluation.unfinished import Unfinished
from dist_adv.models import load_model, read_final
from dist_adv.runs import claim, reading
from dist_adv.runs.folder import RunFolder
from dist_adv.terminal import bar, log_file, start_logging
from dist_adv.tracking.tracker import Tracker, write_results
from dist_adv.training.supervision import check_started_alike, supervised

log = logging.getLogger("dist_adv")


def evaluate_run(
    run_dir: Path, attacks: Sequence[str], limit: int | None, overrides: Sequence[str]
) -> None:
    """Measure the final weights of a run; its own attacks and settings unless told otherwise.

    Every rank calls this. Raises UserError, also where the ranks were not started alike.
    """
    run = RunFolder(run_dir)
    if not run.config.is_file():
        raise UserError(f"{run}: is no run folder (it has no config.yaml); name one")
    config = load_config(run.config, overrides)
    _check_overrides(load_config(run.config), config)
    asked = {"attacks": list(attacks) or config.eval.attacks, "limit": limit or config.eval.limit}
    tree = config.model_dump()
    tree["eval"] |= asked
    config = parse_config(tree, "--attacks")
    check_attacks(config.eval.attacks)
    accelerator = start_accelerator("fp32", config.train.threads)
    start_logging(accelerator.is_main_process)
    on_main(accelerator, lambda: claim.check_writable(run))
    arguments = {"--limit": limit, "weights": files.sha256(run.weights)}
    with plain_failures(accelerator, "eval.batch_size", config.eval.batch_size):
        check_started_alike(config, accelerator, arguments)
        Measurement(run, config, accelerator).take()


def check_attacks(attacks: Sequence[str]) -> None:
    """Raise UserError for what would be missing after hours of training."""
    if "autoattack" in attacks:
        packages.need("pyautoattack", "autoattack", "'dist-adv[autoattack]'")


def _check_overrides(own: Config, config: Config) -> None:
    """Raise UserError for what an evaluation would pass over: the weights are what they are."""
    idle = [
        line
        for line in differences(own, config)
        if not line.startswith(("data.", "eval.", "threat.", "track.", "train.threads:"))
    ]
    if idle:
        raise UserError(
            f"{idle[0]} has no effect on an evaluation, whose weights are trained; leave it out, "
            f"or set something of threat, data or eval"
        )


def measure_the_rest(run: RunFolder, config: Config, accelerator: Accelerator) -> None:
    """Measure what is not measured yet of a run whose training is over. Every rank calls this."""
    trained = read_final(run.weights)["trained"]
    log.info("%s is trained already", run)
    missing = on_main(accelerator, lambda: _missing(run, config))
    if not missing:
        if accelerator.is_main_process and run.state != "done":
            run.mark("done")  # it was killed right before
        return
    main = accelerator.is_main_process
    tracker = Tracker(run, config) if main else None
    rest = config.model_copy(update={"eval": config.eval.model_copy(update={"attacks": missing})})

    def where() -> dict[str, float]:
        return {key: trained[key] for key in ("step", "epoch")}

    with (
        log_file(run.log, main),
        supervised(run, config, accelerator, tracker, where) as session,
    ):
        Measurement(run, rest, accelerator, tracker, session.between_chunks).take()


def _missing(run: RunFolder, config: Config) -> list[str]:
    """Return the configured attacks without a figure on as many images as are configured."""
    results = reading.read_results(run.path, config.threat.model_dump(), config.data.name)
    images = reading.read_environment(run.path).get("dataset", {}).get("test", 1)
    wanted = min(images, config.eval.limit or images)
    done = [attack for attack, figure in results.figures.items() if figure.n >= wanted]
    return [attack for attack in config.eval.attacks if attack not in done]


@dataclass(frozen=True)
class Measurement:
    """`config.eval`'s attacks on the final weights of a run. between: as of `Supervision`."""

    run: RunFolder
    config: Config
    accelerator: Accelerator
    tracker: Tracker | None = None
    between: Callable[[], None] = lambda: None

    def take(self, data: Dataset | None = None) -> None:
        """Measure model.safetensors, the file that is handed on, and record what comes out.

        data: the test images, where they are not to be loaded. Every rank calls this.
        """
        config, accelerator = self.config, self.accelerator
        if not config.eval.attacks:
            return
        trained = read_final(self.run.weights)["trained"]
        model = load_model(self.run.path).to(accelerator.device)
        log.info("evaluating: %s ...", ", ".join(config.eval.attacks))
        data = data or self._load()
        threat = build_threat(config.threat.norm, config.threat.eps)
        with (
            plain_failures(accelerator, "eval.batch_size", config.eval.batch_size),
            bar(accelerator.is_main_process) as progress,
        ):
            display = EvaluationDisplay(progress)
            unfinished = Unfinished(self.run.path, self._identity(data), accelerator)
            supervision = Supervision(display.update, self.between, unfinished)
            results, examples = evaluate(model, data, threat, config.eval, accelerator, supervision)
        if accelerator.is_main_process:
            about = {
                "epoch": trained["epoch"],
                "step": trained["step"],
                "dataset": config.data.name,
                "split": "test",
            }
            write_results(self.run, results, examples, about)
            unfinished.finished()
            if self.tracker:
                self.tracker.results()
            results_table(results)

    def _load(self) -> Dataset:
        first = partial(main_process_first, self.accelerator)
        load = partial(load_dataset, self.config.data, "test", first)
        data = on_every(self.accelerator, load)
        check_same_images(self.accelerator, {"test": data.fingerprint})
        return data

    def _identity(self, data: Dataset) -> dict[str, Any]:
        """Everything that the figures depend on, but for the number of ranks."""
        config, where = self.config, {"root", "resident_gb", "workers"}
        return {
            "weights": files.sha256(self.run.weights),
            "threat": config.threat.model_dump(),
            "data": config.data.model_dump(exclude=where) | {"images": data.fingerprint},
            "eval": {key: getattr(config.eval, key) for key in ("step_size", "loss", "seed")},
            "attacks": config.eval.attacks,
            "limit": config.eval.limit,
        }
