"""Attacks on the final weights of a run that its training has not come to."""

import logging

from accelerate import Accelerator

from dist_adv.config import Config
from dist_adv.distributed.collectives import on_main
from dist_adv.judging.measurement import Measurement, final_weights
from dist_adv.models import read_final
from dist_adv.runs import reading
from dist_adv.runs.checkpoint import newest_state
from dist_adv.runs.folder import RunFolder
from dist_adv.terminal import log_file
from dist_adv.tracking.tracker import Tracker
from dist_adv.training.supervision import supervised

log = logging.getLogger("dist_adv")


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
    saved_id = newest_state(run.checkpoints).get("wandb_id")
    tracker = Tracker(run, config, saved_id) if main else None
    rest = config.model_copy(update={"eval": config.eval.model_copy(update={"attacks": missing})})

    def where() -> dict[str, float]:
        return {key: trained[key] for key in ("step", "epoch")}

    with (
        log_file(run.log, main),
        supervised(run, config, accelerator, tracker, where) as session,
    ):
        Measurement(run, rest, accelerator, tracker, session.between_chunks).take(
            final_weights(run)
        )


def _missing(run: RunFolder, config: Config) -> list[str]:
    """Return the configured attacks without a figure on as many images as are configured."""
    results = reading.read_results(run.path, config.threat.model_dump(), config.data.name)
    images = reading.read_environment(run.path).get("dataset", {}).get("test", 1)
    wanted = min(images, config.eval.limit or images)
    done = [attack for attack, figure in results.figures.items() if figure.n >= wanted]
    return [attack for attack in config.eval.attacks if attack not in done]
