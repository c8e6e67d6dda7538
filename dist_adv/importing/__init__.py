"""`dist-adv import`: somebody's checkpoint becomes a folder of this project."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from dist_adv import files
from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import Config, load_config
from dist_adv.data import Dataset, load_dataset
from dist_adv.distributed.collectives import main_process_first, on_every, on_main
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.start import start_accelerator
from dist_adv.errors import UserError
from dist_adv.evaluation.display import EvaluationDisplay, results_table
from dist_adv.evaluation.evaluate import Supervision, evaluate
from dist_adv.evaluation.results import Result, wilson
from dist_adv.importing.choice import Choice, choose
from dist_adv.importing.folder import fill
from dist_adv.models.foreign_keys import PUBLIC
from dist_adv.terminal import bar, start_logging
from dist_adv.text import nearest

log = logging.getLogger("dist_adv")

_BATCH = "eval.batch_size"
_FOR_A_TRIAL = 500  # test images: enough to tell a right choice from a wrong one


@dataclass(frozen=True)
class Asked:
    """What `dist-adv import` was asked for. expect_clean: in percent."""

    file: Path
    network: str
    overrides: tuple[str, ...]
    normalise: str | None
    expect_clean: float | None
    limit: int | None
    out: Path


def run_import(asked: Asked) -> None:
    """Write a foreign checkpoint as model.safetensors, config.json and README.md to a new folder.

    Its clean accuracy is measured. Every rank calls this.

    Raises UserError where the file, the options or the measured accuracy do not fit, and leaves
    no folder then.
    """
    if asked.network not in PUBLIC:
        raise UserError(f"--as: {asked.network!r} is not known{nearest(asked.network, [*PUBLIC])}")
    config = _configuration(asked)
    accelerator = start_accelerator("fp32")
    start_logging(accelerator.is_main_process)
    with ExitStack() as stack, plain_failures(accelerator, _BATCH, config.eval.batch_size):
        # First: an --out that cannot be is said before minutes of measuring.
        folder = on_main(accelerator, lambda: stack.enter_context(files.new_folder(asked.out)))
        choice = on_every(accelerator, lambda: choose(asked.file, config, asked.normalise))
        for note in choice.foreign.notes:
            log.info("%s: %s", asked.file, note)
        data = on_every(accelerator, lambda: _test_images(config, choice, accelerator))
        judge = _Judge(config, data, accelerator)
        natural = judge.accuracy(choice, asked.limit)
        if accelerator.is_main_process:
            results_table([natural])
        _check_accuracy(asked, choice, natural, judge)
        on_main(accelerator, lambda: fill(folder, choice, data, natural, asked.expect_clean))


@dataclass(frozen=True)
class _Judge:
    """Measures the clean accuracy of what a file is read as. Every rank calls it."""

    config: Config
    data: Dataset
    accelerator: Accelerator

    def accuracy(self, choice: Choice, limit: int | None) -> Result:
        """Return that on the test images, `limit` random ones or all."""
        main, threat = self.accelerator.is_main_process, self.config.threat
        options = self.config.eval.model_copy(update={"attacks": ["natural"], "limit": limit})
        model = choice.build(self.data.classes).to(self.accelerator.device)
        ball = build_threat(threat.norm, threat.eps)
        with bar(main) as progress:
            supervision = Supervision(EvaluationDisplay(progress).update)
            (natural,), _ = evaluate(model, self.data, ball, options, self.accelerator, supervision)
        return natural

    def look_for_another(self, choice: Choice, expected: float) -> str:
        """Say which other shortcut, final norm and normalisation would fit; each is tried."""
        log.info("trying other choices on %d images each ...", min(_FOR_A_TRIAL, len(self.data)))
        tried = [(other, self.accuracy(other, _FOR_A_TRIAL)) for other in choice.others()]
        near = sorted(
            (pair for pair in tried if _fits(pair[1], expected)),
            key=lambda pair: abs(pair[1].accuracy - expected / 100),
        )
        if not near:
            return (
                f"none of {len(tried)} other choices of shortcut, final norm and normalisation "
                f"fits; look at --as and at the data"
            )
        fitting = "; or ".join(
            f"{other.assumed} ({natural.accuracy:.1%} of {natural.n})"
            for other, natural in near[:3]
        )
        return f"what would fit is {fitting}"


def _check_accuracy(asked: Asked, choice: Choice, natural: Result, judge: _Judge) -> None:
    """Raise UserError where another accuracy was expected, saying what would have it."""
    expected = asked.expect_clean
    if expected is None:
        what = choice.assumed or "that it is this network"
        log.warning("nothing proves %s; --expect-clean would", what)
    elif not _fits(natural, expected):
        low, high = wilson(natural.correct, natural.n)
        raise UserError(
            f"--expect-clean: {expected:g} % is not what {asked.file} has: {natural.accuracy:.2%} "
            f"of {natural.n:,} test images ({low:.2%} to {high:.2%}); "
            f"{judge.look_for_another(choice, expected)}"
        )


def _configuration(asked: Asked) -> Config:
    """Return the configuration that has the sections `model` and `data`."""
    allowed = ("model.", "data.", f"{_BATCH}=")
    for override in asked.overrides:
        if not override.startswith(allowed) or override.startswith("model.name="):
            raise UserError(
                f"{override!r}: an import takes keys of model and data; the network is that of --as"
            )
    names = ["method.name=natural", f"model.name={asked.network}"]
    return load_config(None, [*names, *asked.overrides])


def _test_images(config: Config, choice: Choice, accelerator: Accelerator) -> Dataset:
    """Return the images to measure on. Raises UserError where the network is not for them."""
    log.info("measuring it on images of %s ...", config.data.name)
    first = partial(main_process_first, accelerator)
    data = load_dataset(config.data, "test", first)
    for what, theirs, ours in (
        ("classes", choice.classes, len(data.classes)),
        ("channels", choice.channels, data.images.shape[1]),
    ):
        if theirs != ours:
            raise UserError(
                f"{choice.file}: is for {theirs} {what} and {config.data.name} has {ours}; name "
                f"the data that it was trained on with data.name and data.root"
            )
    return data


def _fits(natural: Result, expected: float) -> bool:
    """Tell whether the expected percentage is in the 95 % interval of the measured one."""
    low, high = wilson(natural.correct, natural.n)
    return low <= expected / 100 <= high
