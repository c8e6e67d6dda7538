"""From a configuration to a finished run folder."""

import logging
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dist_adv import files
from dist_adv.attacks.threat import build as build_threat
from dist_adv.by_epoch import firsts, told
from dist_adv.config import Config, longer, parse_config
from dist_adv.distributed.collectives import check_started_alike, on_main
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.start import precision_of, start_accelerator, warn_of_unused_precision
from dist_adv.errors import Preempted, RunFailure, UserError
from dist_adv.judging.measurement import Measurement, final_weights
from dist_adv.methods.carried import BySample
from dist_adv.methods.description import describe
from dist_adv.models import has_batchnorm, save_model, weights_file
from dist_adv.runs import checkpoint, claim
from dist_adv.runs.checkpoint import Checkpoint
from dist_adv.runs.folder import RunFolder
from dist_adv.terminal import bar, log_file, start_logging
from dist_adv.tracking.tracker import Tracker, check_tracking
from dist_adv.training import state
from dist_adv.training.display import TrainingDisplay
from dist_adv.training.measure import measure_the_rest
from dist_adv.training.supervision import supervised
from dist_adv.training.trainer import Surroundings, Trainer

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
    train, run = config.train, RunFolder(run_dir)
    accelerator = start_accelerator(train.precision, train.threads, train.deterministic)
    start_logging(accelerator.is_main_process)
    with ExitStack() as stack:
        try:
            with plain_failures(accelerator, "train.batch_size", train.batch_size):
                _train(config, run, resume, accelerator, stack)
        except (UserError, Preempted):
            raise
        except Exception as failure:  # also one that nobody foresaw: `running` would mean killed
            if accelerator.is_main_process and run.state:
                with suppress(RunFailure):
                    run.mark("failed", reason=str(failure) or type(failure).__name__)
            raise


def _train(
    config: Config, run: RunFolder, resume: str, accelerator: Accelerator, stack: ExitStack
) -> None:
    arguments: dict[str, Any] = {"--run-dir": str(run), "--resume": resume}
    if config.train.start:
        arguments["weights of train.start"] = files.sha256(weights_file(config.train.start))
    check_started_alike(config, accelerator, arguments)
    exists = on_main(accelerator, partial(_take, run, config, resume, stack))
    if on_main(accelerator, lambda: exists and claim.trained(run, config)):
        measure_the_rest(run, config, accelerator)
        return
    main = accelerator.is_main_process
    if exists:
        stack.enter_context(log_file(run.log, main))
    log.info("loading %s ...", config.data.name)
    trainer = Trainer(config, accelerator)
    start = on_main(accelerator, lambda: _starting_point(run, config, resume))
    if start:
        _go_on_from(trainer, *start, insist=resume not in ("auto", "none"))
    about = _about(trainer)
    on_main(accelerator, partial(_open, run, trainer, about, exists, stack))
    if not exists:
        stack.enter_context(log_file(run.log, main))
    tracker = _tracker(run, trainer, start) if main else None
    _announce(run, trainer, about["precision"])
    learner = trainer.learner

    def where() -> dict[str, float]:
        return {"step": learner.clock.step, "epoch": learner.epochs}

    with supervised(run, config, accelerator, tracker, where) as session:
        try:
            with bar(main) as progress:
                display = TrainingDisplay(progress, learner.total_steps, learner.clock.step)
                trainer.fit(Surroundings(run, session, tracker, display))
        finally:
            with suppress(RunFailure):
                trainer.writer.wait()
        on_main(accelerator, lambda: _save_final(run, trainer))
        measurement = Measurement(run, config, accelerator, tracker, session.between_chunks)
        measurement.take(final_weights(run), trainer.test_data)


def _take(run: RunFolder, config: Config, resume: str, stack: ExitStack) -> bool:
    """Lock the folder of an earlier start until `stack` ends; False where there is none."""
    lock = claim.take(run, config, resume != "none")
    if lock:
        stack.callback(lock.release)
        checkpoint.remove_leftovers(run.checkpoints)
    return lock is not None


def _starting_point(run: RunFolder, config: Config, resume: str) -> tuple[Path, Checkpoint] | None:
    """Return the checkpoint to go on from, or None for the beginning."""
    if resume not in ("auto", "none"):
        path = Path(resume)
        try:
            saved = checkpoint.load(path)
        except UserError as error:
            raise UserError(f"{error}; name a good one or use --resume auto") from None
        claim.check_same_experiment(parse_config(saved.state["config"], str(path)), config, path)
        claim.check_same_start(saved.state.get("start"), config, path)
        return path, saved
    found = checkpoint.load_newest(run.checkpoints, log.warning)
    if found is None and resume == "auto" and run.config.exists():
        log.info("%s has no checkpoint yet: starting from the beginning", run)
    return found


def _go_on_from(trainer: Trainer, path: Path, saved: Checkpoint, insist: bool) -> None:
    """Put the trainer where a checkpoint was, and say what differs although it may."""
    learner, config = trainer.learner, trainer.config
    state.check_sources(config, saved, path, insist)
    state.check_images(learner, trainer.kept, saved, path, insist)
    state.restore(learner, trainer.kept, saved, path)
    log.info("going on from %s (epoch %g)", path, learner.epochs)
    before, now = saved.state["world_size"], trainer.accelerator.num_processes
    if before != now:
        shares = ", but BatchNorm's statistics are of each rank's share"
        log.warning(
            "%d rank(s) before, %d now: the same batches go on%s",
            before,
            now,
            shares if has_batchnorm(learner.copy) else "",
        )
    grown = longer(parse_config(saved.state["config"], "checkpoint"), config)
    if grown:
        log.warning("longer than planned (%s): the schedule is fitted to it now", "; ".join(grown))


def _about(trainer: Trainer) -> dict[str, Any]:
    """Return what env.json says of a run besides what it ran on."""
    learner = trainer.learner
    sources, changes = trainer.config.sources(), trainer.config.changes
    by_epoch = {str(first): told(changes, first) for first in firsts(changes) if changes}
    return {
        **({"sources": sources} if sources else {}),
        **({"start": learner.started_from} if learner.started_from else {}),
        "precision": precision_of(trainer.accelerator),
        "total_steps": learner.total_steps,
        "method": _method(trainer),
        **({"by_epoch": by_epoch} if by_epoch else {}),
        "dataset": {
            "name": trainer.config.data.name,
            "train": len(learner.data),
            "test": len(trainer.test_data),
            "classes": learner.data.classes,
            **trainer.test_data.known_by(),
        },
    }


def _method(trainer: Trainer) -> dict[str, Any]:
    """Describe the method; where it is by epoch its passes are the mean, by area at the end."""
    config, data = trainer.config, trainer.learner.data
    about, passes = {}, 0.0
    shape = torch.Size(data.images.shape[1:])
    for stage in trainer.learner.stages.all:
        threat = build_threat(stage.config.threat.norm, stage.config.threat.eps)
        perturbed = stage.config.awp is not None
        about = describe(stage.config.method, threat, shape, len(data.classes), perturbed)
        area = (stage.config.data.size or 1) / (config.data.size or 1)
        share = (min(stage.end, config.train.epochs) - stage.first) / config.train.epochs
        passes += about["passes"] * area**2 * share
    return about | {"passes": round(passes, 4)}


def _open(
    run: RunFolder, trainer: Trainer, about: dict[str, Any], exists: bool, stack: ExitStack
) -> None:
    """Write down what is started now, in a folder that is there or a new one."""
    if exists:
        claim.go_on(run, trainer.config, trainer.accelerator, about)
    else:
        lock = claim.create(run, trainer.config, trainer.accelerator, about)
        stack.callback(lock.release)
    run.mark("running")


def _tracker(run: RunFolder, trainer: Trainer, start: tuple[Path, Checkpoint] | None) -> Tracker:
    """Go on with the run on W&B of a checkpoint of this folder; start another for any other."""
    path, saved = start or (None, None)
    known = saved.state["wandb_id"] if saved else None
    config, step = trainer.config, trainer.learner.clock.step
    if path and path.resolve().parent == run.checkpoints.resolve():
        return Tracker(run, config, known, step)
    return Tracker(run, config, None, step, started_from=known)


def _announce(run: RunFolder, trainer: Trainer, precision: str) -> None:
    config, accelerator = trainer.config, trainer.accelerator
    log.info(
        "%s: %s on %s, %d images, %d steps, %s, %s with %d rank(s)",
        run,
        config.method.name,
        config.data.name,
        len(trainer.learner.data),
        trainer.learner.total_steps,
        precision,
        accelerator.device.type,
        accelerator.num_processes,
    )
    if config.train.start:
        log.info("started from the weights of %s, with their normalisation", config.train.start)
    warn_of_unused_precision(accelerator)
    if trainer.learner.method.caution:
        log.warning("method.name: %s", trainer.learner.method.caution)
    carried = trainer.learner.method.carried().values()
    tables = sum(each.rows.nbytes for each in carried if isinstance(each, BySample))
    if tables:
        log.info(
            "its rows a training image take %.1f MB on every rank and in checkpoints", tables / 1e6
        )
    if config.train.compile != "none":
        log.info("the first steps wait for torch.compile ...")


def _save_final(run: RunFolder, trainer: Trainer) -> None:
    """Write the weights and how they came about: the file marks the end of training."""
    config, network = trainer.config, trainer.learner.copy
    architecture = {
        **network.architecture,
        "trained": {**trainer.trained(), "method": config.method.name, "data": config.data.name},
        "threat": config.threat.model_dump(),
    }
    save_model(run.weights, architecture, network.state_dict())
