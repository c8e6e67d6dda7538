"""From a configuration to a finished run folder, and from a run folder to more results."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dist_adv import packages
from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import Config, differences, flatten, load_config, longer, parse_config
from dist_adv.data import Dataset, load_dataset
from dist_adv.distributed.collectives import (
    check_same_images,
    check_same_start,
    main_process_first,
    on_every,
    on_main,
)
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.session import Session
from dist_adv.distributed.start import start_accelerator, warn_of_unused_precision
from dist_adv.errors import Preempted, RunFailure, UserError
from dist_adv.evaluation.display import EvaluationDisplay, results_table
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.evaluation.unfinished import Unfinished
from dist_adv.models import load_model, read_final, save_model
from dist_adv.runs import checkpoint, reading
from dist_adv.runs.checkpoint import Checkpoint
from dist_adv.runs.environment import code_version
from dist_adv.runs.folder import (
    check,
    check_same_experiment,
    check_writable,
    config_of,
    create,
    go_on,
    mark,
    state_of,
    trained,
)
from dist_adv.terminal import bar, log_file, start_logging
from dist_adv.tracking.tracker import Tracker, check_tracking, write_results
from dist_adv.training import state
from dist_adv.training.trainer import Trainer

log = logging.getLogger("dist_adv")


def train_run(config: Config, run_dir: Path, resume: str) -> None:
    """Train `config` in `run_dir` to the end and evaluate the final weights.

    resume: `auto` goes on from the newest good checkpoint of `run_dir` where it exists; `none`
    insists on a new folder; anything else is a checkpoint folder to start from. What is finished
    already is not done again. Every rank calls this.

    Raises UserError before anything is written where the pieces do not fit, or the ranks were not
    started alike; Preempted where the run was asked to stop, and goes on when it is started again;
    RunFailure where it cannot go on.
    """
    check_tracking(config)
    _check_attacks(config.eval.attacks)
    train = config.train
    accelerator = start_accelerator(train.precision, train.threads, train.deterministic)
    start_logging(accelerator.is_main_process)
    with ExitStack() as stack:
        try:
            with plain_failures(accelerator, "train.batch_size", config.train.batch_size):
                _train(config, run_dir, resume, accelerator, stack)
        except (UserError, Preempted):
            raise
        except Exception as failure:  # also one that nobody foresaw: `running` would mean killed
            if accelerator.is_main_process and state_of(run_dir):
                with suppress(RunFailure):
                    mark(run_dir, "failed", reason=str(failure) or type(failure).__name__)
            raise


def _what_is_started(
    config: Config, accelerator: Accelerator, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """What has to be the same on every rank; the images may lie elsewhere on each machine."""
    settings = flatten(config.model_dump()) | {"train.precision": accelerator.mixed_precision}
    del settings["data.root"]
    return {**settings, **arguments, "code": code_version(), "torch": torch.__version__}


def _train(
    config: Config, run_dir: Path, resume: str, accelerator: Accelerator, stack: ExitStack
) -> None:
    arguments = {"--run-dir": str(run_dir), "--resume": resume}
    check_same_start(accelerator, _what_is_started(config, accelerator, arguments))

    def claim() -> bool:
        lock = check(run_dir, config, resume != "none")
        if lock:
            stack.callback(lock.release)
            checkpoint.remove_leftovers(run_dir / "checkpoints")
        return lock is not None

    exists = on_main(accelerator, claim)
    if on_main(accelerator, lambda: exists and trained(run_dir, config)):
        _evaluate_the_rest(config, run_dir, accelerator)
        return
    main = accelerator.is_main_process
    if exists:
        stack.enter_context(log_file(run_dir / "log.txt", main))
    log.info("loading %s ...", config.data.name)
    trainer = Trainer(config, accelerator)
    start = on_main(accelerator, lambda: _starting_point(run_dir, config, resume))
    if start:
        path, saved = start
        state.check_images(trainer, saved, path, insist=resume not in ("auto", "none"))
        state.restore(trainer, saved, path)
        log.info("going on from %s (pass %g)", path, trainer.passes)
        _say_what_differs(config, accelerator, saved)
    about = {
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "total_steps": trainer.total_steps,
        "dataset": {
            "name": config.data.name,
            "train": len(trainer.train_data),
            "test": len(trainer.test_data),
            "classes": trainer.train_data.classes,
        },
    }

    def open_folder() -> None:
        if exists:
            go_on(run_dir, config, accelerator, about)
        else:
            stack.callback(create(run_dir, config, accelerator, about).release)
        mark(run_dir, "running")

    on_main(accelerator, open_folder)
    if not exists:
        stack.enter_context(log_file(run_dir / "log.txt", main))
    tracker = _tracker(run_dir, config, trainer, start) if main else None
    log.info(
        "%s: %s on %s, %d images, %d steps, %s, %s with %d rank(s)",
        run_dir,
        config.method.name,
        config.data.name,
        len(trainer.train_data),
        trainer.total_steps,
        about["precision"],
        accelerator.device.type,
        accelerator.num_processes,
    )

    warn_of_unused_precision(accelerator)
    if config.train.compile != "none":
        log.info("the first steps wait for torch.compile ...")

    def where() -> dict[str, float]:
        return {"step": trainer.clock.step, "epoch": trainer.passes}

    with _supervised(run_dir, config, accelerator, tracker, where) as session:
        try:
            with bar(main) as progress:
                trainer.fit(run_dir, session, tracker, progress)
        finally:
            with suppress(RunFailure):
                trainer.writer.wait()
        on_main(accelerator, lambda: _save_final(run_dir, trainer))
        _evaluate(
            config,
            run_dir,
            accelerator,
            config.eval.attacks,
            config.eval.limit,
            trainer.test_data,
            tracker,
            session.between_chunks,
        )


def _tracker(
    run_dir: Path, config: Config, trainer: Trainer, start: tuple[Path, Checkpoint] | None
) -> Tracker:
    """The same run on W&B for a checkpoint of this folder, another one for any other."""
    path, saved = start or (None, None)
    known = saved.state["wandb_id"] if saved else None
    if path and path.resolve().parent == (run_dir / "checkpoints").resolve():
        return Tracker(run_dir, config, known, trainer.clock.step)
    return Tracker(run_dir, config, None, trainer.clock.step, started_from=known)


def _evaluate_the_rest(config: Config, run_dir: Path, accelerator: Accelerator) -> None:
    """What is not measured yet of a run whose training is over."""
    trained = read_final(run_dir / "model.safetensors")["trained"]
    log.info("%s is trained already", run_dir)
    missing = on_main(accelerator, lambda: _missing(run_dir, config))
    if not missing:
        if accelerator.is_main_process and state_of(run_dir) != "done":
            mark(run_dir, "done")  # it was killed right before
        return
    main = accelerator.is_main_process
    tracker = Tracker(run_dir, config) if main else None

    def where() -> dict[str, float]:
        return {key: trained[key] for key in ("step", "epoch")}

    with (
        log_file(run_dir / "log.txt", main),
        _supervised(run_dir, config, accelerator, tracker, where) as session,
    ):
        _evaluate(
            config,
            run_dir,
            accelerator,
            missing,
            config.eval.limit,
            tracker=tracker,
            between=session.between_chunks,
        )


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


def _check_attacks(attacks: Sequence[str]) -> None:
    """Raise UserError for what would be missing after hours of training."""
    if "autoattack" in attacks:
        packages.need("pyautoattack", "autoattack", "'dist-adv[autoattack]'")


@contextmanager
def _supervised(
    run_dir: Path,
    config: Config,
    accelerator: Accelerator,
    tracker: Tracker | None,
    where: Callable[[], dict[str, float]],
) -> Iterator[Session]:
    """A session; status.json and the dashboards are told how it ended."""
    main = accelerator.is_main_process
    finish = tracker.finish if tracker else lambda status, failure="": None
    session = Session(accelerator, run_dir, config.train)
    try:
        yield session
        session.leave()
        if main:
            mark(run_dir, "done")
        finish(0)
    except Preempted as stop:
        log.warning("stopped (%s) at optimiser step %d", stop.reason, where()["step"])
        if main:
            session.stopping.heeded()
            mark(run_dir, "preempted", reason=stop.reason, **where())
        finish(stop.status)
        session.leave()  # the first to go gets the others killed
        raise
    except Exception as error:
        finish(1, f"{run_dir}: {error}")
        raise
    finally:
        session.close()


def _say_what_differs(config: Config, accelerator: Accelerator, saved: Checkpoint) -> None:
    """What may change the weights although it is no difference of configuration."""
    before, now = saved.state["world_size"], accelerator.num_processes
    if before != now:
        log.warning(
            "%d rank(s) before, %d now: the same batches go on%s",
            before,
            now,
            ", but BatchNorm's statistics are of each rank's share"
            * (config.model.norm == "batch"),
        )
    grown = longer(parse_config(saved.state["config"], "checkpoint"), config)
    if grown:
        log.warning("longer than planned (%s): the schedule is fitted to it now", "; ".join(grown))


def evaluate_run(
    run_dir: Path, attacks: Sequence[str], limit: int | None, overrides: Sequence[str]
) -> None:
    """Measure the final weights of a run; its own attacks and settings unless told otherwise.

    Every rank calls this. Raises UserError, also where the ranks were not started alike.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: is no run folder (it has no config.yaml); name one")
    config = load_config(run_dir / "config.yaml", overrides)
    _check_overrides(config_of(run_dir), config)
    if attacks:
        tree = config.model_dump()
        tree["eval"]["attacks"] = list(attacks)
        config = parse_config(tree, "--attacks")
    _check_attacks(config.eval.attacks)
    accelerator = start_accelerator("fp32", config.train.threads)
    start_logging(accelerator.is_main_process)
    on_main(accelerator, lambda: check_writable(run_dir))
    arguments = {"--limit": limit, "weights": _weights(run_dir)}
    with plain_failures(accelerator, "eval.batch_size", config.eval.batch_size):
        check_same_start(accelerator, _what_is_started(config, accelerator, arguments))
        _evaluate(config, run_dir, accelerator, config.eval.attacks, limit or config.eval.limit)


def _evaluate(
    config: Config,
    run_dir: Path,
    accelerator: Accelerator,
    attacks: Sequence[str],
    limit: int | None,
    data: Dataset | None = None,
    tracker: Tracker | None = None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Measure `model.safetensors`, the file that is handed on, and record what came out."""
    if not attacks:
        return
    trained = read_final(run_dir / "model.safetensors")["trained"]
    model = load_model(run_dir).to(accelerator.device)
    first = partial(main_process_first, accelerator)
    log.info("evaluating: %s ...", ", ".join(attacks))
    if data is None:
        data = on_every(accelerator, lambda: load_dataset(config.data, "test", first))
        check_same_images(accelerator, {"test": data.fingerprint})
    threat = build_threat(config.threat.norm, config.threat.eps)
    with (
        plain_failures(accelerator, "eval.batch_size", config.eval.batch_size),
        bar(accelerator.is_main_process) as progress,
    ):
        display = EvaluationDisplay(progress)
        identity = _identity(config, run_dir, attacks, limit, data)
        unfinished = Unfinished(run_dir, identity, accelerator)
        results, examples = evaluate(
            model,
            data,
            threat,
            config.eval,
            accelerator,
            attacks,
            limit,
            display.update,
            between,
            unfinished,
        )
    if accelerator.is_main_process:
        about = {
            "epoch": trained["epoch"],
            "step": trained["step"],
            "dataset": config.data.name,
            "split": "test",
        }
        write_results(run_dir, results, examples, about)
        unfinished.finished()
        if tracker:
            tracker.results()
        results_table(results)


def _identity(
    config: Config, run_dir: Path, attacks: Sequence[str], limit: int | None, data: Dataset
) -> dict[str, Any]:
    """Everything that an evaluation's figures depend on, but for the number of ranks."""
    where = {"root", "resident_gb", "workers"}
    return {
        "weights": _weights(run_dir),
        "threat": config.threat.model_dump(),
        "data": config.data.model_dump(exclude=where) | {"images": data.fingerprint},
        "eval": {key: getattr(config.eval, key) for key in ("step_size", "loss", "seed")},
        "attacks": list(attacks),
        "limit": limit,
    }


def _weights(run_dir: Path) -> str | None:
    """SHA-256 of the final weights; None where they cannot be read."""
    with suppress(OSError), (run_dir / "model.safetensors").open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()
    return None


def _save_final(run_dir: Path, trainer: Trainer) -> None:
    """The weights with how they came about, whole or not at all: the file marks the run's end."""
    config = trainer.config
    architecture = {
        **trainer.copy.architecture,
        "trained": {**trainer.trained(), "method": config.method.name, "data": config.data.name},
        "threat": config.threat.model_dump(),
    }
    save_model(run_dir / "model.safetensors", architecture, trainer.copy.state_dict())


def _missing(run_dir: Path, config: Config) -> list[str]:
    """The configured attacks without a figure on as many images as are configured."""
    results = reading.read_results(run_dir, config.threat.model_dump(), config.data.name)
    images = reading.read_environment(run_dir).get("dataset", {}).get("test", 1)
    wanted = min(images, config.eval.limit or images)
    done = [attack for attack, figure in results.figures.items() if figure.n >= wanted]
    return [attack for attack in config.eval.attacks if attack not in done]


def _starting_point(run_dir: Path, config: Config, resume: str) -> tuple[Path, Checkpoint] | None:
    """The checkpoint to go on from, or None for the beginning."""
    if resume not in ("auto", "none"):
        path = Path(resume)
        try:
            saved = checkpoint.load(path)
        except UserError as error:
            raise UserError(f"{error}; name a good one or use --resume auto") from None
        check_same_experiment(parse_config(saved.state["config"], str(path)), config, path)
        return path, saved
    folder = run_dir / "checkpoints"
    found = checkpoint.load_newest(folder, log.warning)
    if (
        found is None
        and run_dir.exists()
        and resume == "auto"
        and (run_dir / "config.yaml").exists()
    ):
        log.info("%s has no checkpoint yet: starting from the beginning", run_dir)
    return found
