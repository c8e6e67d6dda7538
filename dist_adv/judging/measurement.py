"""A network's figures under attacks, added to the results of its folder."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from accelerate import Accelerator
from torch import nn

from dist_adv import files
from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import Config, Judged, Reference, parse
from dist_adv.data import Dataset, load_dataset
from dist_adv.distributed.collectives import check_same_images, main_process_first, on_every
from dist_adv.distributed.failures import plain_failures
from dist_adv.errors import UserError
from dist_adv.evaluation.display import EvaluationDisplay, results_table
from dist_adv.evaluation.doubts import doubts
from dist_adv.evaluation.evaluate import Supervision, evaluate
from dist_adv.evaluation.results import Examples, Result
from dist_adv.evaluation.unfinished import Unfinished
from dist_adv.models import load_model, read_final
from dist_adv.runs import reading
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.run import read_examples
from dist_adv.terminal import bar
from dist_adv.tracking.tracker import Tracker, write_results

log = logging.getLogger("dist_adv")

Kind = TypeVar("Kind", Config, Judged)


@dataclass(frozen=True)
class Subject:
    """A network to measure.

    load: makes it. identity: tells it from others of its folder. about: what results.jsonl says
    of it besides its figures.
    """

    load: Callable[[], nn.Module]
    identity: Mapping[str, Any]
    about: Mapping[str, Any]


def final_weights(run: RunFolder) -> Subject:
    """Return the network of model.safetensors, the file that is handed on.

    Raises UserError where the run is not finished.
    """
    trained = read_final(run.weights)["trained"]
    about = {"epoch": trained["epoch"], "step": trained["step"]}
    return Subject(partial(load_model, run.path), {"weights": files.sha256(run.weights)}, about)


@dataclass(frozen=True)
class Asked:
    """What a command asks for.

    attacks, limit: in place of the configuration's own. overrides: of its keys. thorough: the
    attacks of an examination, and another network to try images of.
    """

    attacks: Sequence[str] = ()
    limit: int | None = None
    overrides: Sequence[str] = ()
    thorough: bool = False
    second: Reference | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what ranks must have been given alike besides the configuration."""
        second = self.second and self.second.reference
        return {"--limit": self.limit, "--thorough": self.thorough, "--second": second}

    def over(self, config: Kind) -> Kind:
        """Return a configuration with these attacks and this limit.

        Raises UserError for an attack that is not known.
        """
        attacks = list(self.attacks) or config.eval.attacks
        tree = config.model_dump()
        tree["eval"] |= {"attacks": attacks, "limit": self.limit or config.eval.limit}
        return parse(tree, "--attacks", type(config))


@dataclass(frozen=True)
class Measurement:
    """`config.eval`'s attacks on a network, in a folder.

    own: the folder's configuration, where `config` is another. between: as of `Supervision`.
    """

    folder: RunFolder
    config: Config | Judged
    accelerator: Accelerator
    tracker: Tracker | None = None
    between: Callable[[], None] = lambda: None
    own: Config | Judged | None = None

    def take(self, subject: Subject, data: Dataset | None = None) -> None:
        """Measure, and record what comes out. Every rank calls this.

        data: the test images, where they are not to be loaded.
        """
        config, accelerator = self.config, self.accelerator
        if not config.eval.attacks:
            return
        model = subject.load().to(accelerator.device)
        log.info("evaluating: %s ...", ", ".join(config.eval.attacks))
        data = data or load_test_images(config, accelerator)
        threat = build_threat(config.threat.norm, config.threat.eps)
        with (
            plain_failures(accelerator, "eval.batch_size", config.eval.batch_size),
            bar(accelerator.is_main_process) as progress,
        ):
            doubtful = doubts(model, data, config.eval)
            for each in doubtful:
                log.warning("%s", each)
            display = EvaluationDisplay(progress)
            about = self.identity(subject, data)
            unfinished = Unfinished(self.folder.path, about, accelerator)
            supervision = Supervision(display.update, self.between, unfinished)
            results, examples = evaluate(model, data, threat, config.eval, accelerator, supervision)
        for result in results:
            result.flags.extend(doubtful if result.attack == "natural" else [])
        if accelerator.is_main_process:
            where = {
                "dataset": config.data.name,
                "split": "test",
                **data.known_by(),
            }
            pictures = examples if self._shown(examples, results, data) else None
            write_results(self.folder, results, pictures, {**subject.about, **where})
            unfinished.finished()
            if self.tracker:
                self.tracker.results()
            results_table(results, said=doubtful)

    def _shown(self, examples: Examples | None, results: Sequence[Result], data: Dataset) -> bool:
        """Whether the folder's pictures are to be these.

        They are of its own images and ball, and of no quicker look than those that are there.
        """
        own, now = self.own or self.config, self.config
        alike = [(each.data.name, each.threat.norm, each.threat.eps) for each in (own, now)]
        if examples is None or alike[0] != alike[1]:
            return False
        path, name = self.folder.path, own.data.name
        with suppress(UserError):  # of what is damaged there nothing is to be kept
            if not reading.same_images(reading.own_images(path, name), data.known_by()):
                return False
            before = read_examples(self.folder.examples)
            figures = reading.read_results(path, own.threat.model_dump(), name).figures
            if before and before.attack in figures:
                return max(result.n for result in results) >= figures[before.attack].n
        return True

    def identity(self, subject: Subject, data: Dataset) -> dict[str, Any]:
        """Return everything that the figures depend on, but for the number of ranks."""
        config, where = self.config, {"root", "resident_gb", "workers"}
        return {
            **subject.identity,
            "threat": config.threat.model_dump(),
            "data": config.data.model_dump(exclude=where) | {"images": data.fingerprint},
            "eval": {key: getattr(config.eval, key) for key in ("step_size", "loss", "seed")},
            "attacks": config.eval.attacks,
            "limit": config.eval.limit,
            "attack_options": config.eval.attack_options,
            "sources": config.sources(),
        }


def load_test_images(config: Config | Judged, accelerator: Accelerator) -> Dataset:
    """Return the test images, the same on every rank; UserError on all where one has others."""
    first = partial(main_process_first, accelerator)
    data = on_every(accelerator, partial(load_dataset, config.data, "test", first))
    check_same_images(accelerator, {"test": data.fingerprint}, config.data.name)
    return data
