"""More attacks on a finished run, with its own settings unless told otherwise."""

from pathlib import Path

from dist_adv import files
from dist_adv.config import Config, differences, load_config
from dist_adv.distributed.collectives import check_started_alike, on_main
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.start import start_accelerator
from dist_adv.errors import UserError
from dist_adv.judging.measurement import Asked, Measurement, final_weights
from dist_adv.judging.thorough import measure
from dist_adv.runs import claim
from dist_adv.runs.folder import RunFolder
from dist_adv.terminal import start_logging


def evaluate_run(run_dir: Path, asked: Asked) -> None:
    """Measure the final weights of a run; its own attacks and settings unless told otherwise.

    Every rank calls this. Raises UserError, also where the ranks were not started alike.
    """
    run = RunFolder(run_dir)
    if not run.config.is_file():
        raise UserError(
            f"{run}: is no run folder (it has no config.yaml); name one, or a network with --model"
        )
    own = load_config(run.config)
    config = load_config(run.config, asked.overrides)
    _check_overrides(own, config)
    config = asked.over(config)
    accelerator = start_accelerator("fp32", config.train.threads)
    start_logging(accelerator.is_main_process)
    on_main(accelerator, lambda: claim.check_writable(run))
    arguments = {**asked.arguments(), "weights": files.sha256(run.weights)}
    with plain_failures(accelerator, "eval.batch_size", config.eval.batch_size):
        check_started_alike(config, accelerator, arguments)
        measure(Measurement(run, config, accelerator, own=own), final_weights(run), asked)


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
