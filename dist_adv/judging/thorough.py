"""Whether a robust accuracy is the network's merit or the attacks' failure.

Figures must fit together. The signs that they do not are those of Athalye et al. 2018 (section
3.1) and Carlini et al. 2019 (section 4): gradients that lead nowhere are beaten by an attack that
takes none, by another loss, from another start, through another network, and accuracy stays where
the ball is so large that every image can become any other.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dist_adv import files, plugins
from dist_adv.attacks.pgd import PGD
from dist_adv.attacks.spec import GROUP, AttackOptions
from dist_adv.attacks.threat import Threat
from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import EvalOptions, ThreatOptions
from dist_adv.data import Dataset
from dist_adv.distributed.failures import plain_failures
from dist_adv.evaluation.alignment import alignment
from dist_adv.evaluation.display import EvaluationDisplay
from dist_adv.evaluation.doubts import doubts
from dist_adv.evaluation.evaluate import Supervision, evaluate
from dist_adv.evaluation.images import Images
from dist_adv.evaluation.results import Result, wilson
from dist_adv.evaluation.tally import Tally
from dist_adv.evaluation.unfinished import Unfinished
from dist_adv.judging.measurement import Asked, Measurement, Subject, load_test_images
from dist_adv.judging.network import digest_of, load_everywhere
from dist_adv.terminal import bar
from dist_adv.text import pixels

IMAGES = 200
"""Of the test set, unless somebody asks for more: the work is that of ten times PGD-50-10."""
_STRONGEST = "pgd-50-10"
_BENT = 0.2
"""The alignment below which a loss is no plane within the ball (`training.collapse.BENT`)."""
# Too few classes for an attack of an ensemble; and what AutoAttack says of one image of 200, where
# figures are compared by their intervals here.
_PASSED_OVER = (" is left out", "Square, which takes no gradient")


@dataclass(frozen=True)
class Part:
    """Attacks that are run together, and what is unusual of them.

    called: added to their names. changes: of the section `eval`. eps: of the ball, where it is
    another than the folder's.
    """

    attacks: Sequence[str]
    called: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    eps: float | None = None


@dataclass(frozen=True)
class Examined:
    """What an examination has found.

    figures: by name, such as `pgd-50-10, margin`. alignment: the mean cosine of input gradients
    at an image and at the end of a step of eps. doubtful: what looks wrong without any attack.
    """

    figures: dict[str, Result]
    alignment: float
    doubtful: Sequence[str]

    def reasons(self) -> list[str]:
        """Return why the robust accuracy is not to be believed; nothing where all fits together."""
        checks = (self._weaker_than_others, self._seeds, self._widest, self._bent)
        return [*self.doubtful, *self._flags(), *(reason for check in checks for reason in check())]

    def _flags(self) -> Iterator[str]:
        """Yield the figures' flags, alike ones once, whatever their numbers."""
        alike: dict[str, list[tuple[str, str]]] = {}
        for name, result in self.figures.items():
            for flag in result.flags:
                if not any(part in flag for part in _PASSED_OVER):
                    alike.setdefault(re.sub(r"[\d.]+", "", flag), []).append((name, flag))
        for (name, flag), *others in alike.values():
            more = f" (and {len(others)} more)" if others else ""
            yield f"{name}{more}: {flag}"

    def _weaker_than_others(self) -> Iterator[str]:
        strongest = self.figures[_STRONGEST]
        for name, result in self.figures.items():
            # AutoAttack is the stronger one on honest networks, too: by a seventh at most in what
            # is published and was seen here.
            usual = 0.75 if name == "autoattack" else 1.0
            apart = below(result, strongest) and result.accuracy < usual * strongest.accuracy
            if ", eps " not in name and apart:
                yield (
                    f"{name} leaves {result.accuracy:.1%} and {_STRONGEST} "
                    f"{strongest.accuracy:.1%}: its gradients do not lead where it is wrong"
                )

    def _seeds(self) -> Iterator[str]:
        one, other = self.figures["pgd-10"], self.figures["pgd-10, another seed"]
        if below(one, other) or below(other, one):
            yield (
                f"pgd-10 leaves {one.accuracy:.1%} with one seed and {other.accuracy:.1%} with "
                f"another: the network knows the attack's random numbers"
            )

    def _widest(self) -> Iterator[str]:
        wide = [result for name, result in self.figures.items() if ", eps " in name]
        if wide and wide[-1].accuracy > 0.05:
            yield (
                f"{wide[-1].accuracy:.1%} are right within eps {wide[-1].settings['eps']:.2g}, in "
                f"which every image can become grey: the gradients do not lead there"
            )

    def _bent(self) -> Iterator[str]:
        robust = self.figures[_STRONGEST].accuracy > self.figures["natural"].accuracy / 4
        if robust and self.alignment < _BENT:
            yield (
                f"the loss is no plane within the ball (the cosine of input gradients at both ends "
                f"of a step is {self.alignment:.2f}): gradient attacks may fail on it"
            )


def below(lower: Result, higher: Result) -> bool:
    """Tell whether two 95 % intervals lie apart, in this order."""
    return wilson(lower.correct, lower.n)[1] < wilson(higher.correct, higher.n)[0]


def measure(
    measurement: Measurement, subject: Subject, asked: Asked, data: Dataset | None = None
) -> None:
    """Take a measurement, or make the examination that is asked for. Every rank calls this.

    data: the test images, where they are loaded already.
    """
    if not asked.thorough:
        measurement.take(subject, data)
        return
    data = data or load_test_images(measurement.config, measurement.accelerator)
    second = (
        load_everywhere(asked.second, "--second", data, measurement.accelerator)
        if asked.second
        else None
    )
    examine(measurement, subject, data, second)


def examine(
    measurement: Measurement, subject: Subject, data: Dataset, second: nn.Module | None
) -> None:
    """Run every part, write thorough.json into the folder, and print a table and a verdict.

    Every rank calls this. What an earlier call has measured is not measured again.

    second: another network for the same images, whose adversarial images are tried on this one.

    Raises UserError as `evaluate` does.
    """
    config, accelerator = measurement.config, measurement.accelerator
    main = accelerator.is_main_process
    model = subject.load().to(accelerator.device)
    given, other = None, ""
    if second is not None:
        other = digest_of(second)
        kind = _transfer(second.to(accelerator.device))
        given = plugins.give("transfer", GROUP, kind)
    figures: dict[str, Result] = {}
    kept = []
    with (
        plain_failures(accelerator, "eval.batch_size", config.eval.batch_size),
        bar(main) as progress,
    ):
        display = EvaluationDisplay(progress)
        doubtful = doubts(model, data, config.eval)
        widest = _widest(config.threat.norm, math.prod(data.images.shape[1:]))
        for part in _parts(config.threat, config.eval.seed, len(data.classes), given, widest):
            options = _options(config.eval, part)
            threat = build_threat(config.threat.norm, part.eps or config.threat.eps)
            about = measurement.identity(subject, data) | {
                "part": part.called,
                "attacks": options.attacks,
                "limit": options.limit,
                "eval": {key: getattr(options, key) for key in ("step_size", "loss", "seed")},
                "threat": [threat.norm, threat.eps],
                "second": other if part.attacks == [given] else "",
            }
            unfinished = Unfinished(measurement.folder.path, about, accelerator)
            kept.append(unfinished)
            supervision = Supervision(display.update, unfinished=unfinished)
            results, _ = evaluate(model, data, threat, options, accelerator, supervision)
            for result in results:
                figures[result.attack.removeprefix("given:") + part.called] = result
            if part.eps and results[0].correct == 0:
                break
        bent = _alignment(measurement, model, data)
    examined = Examined(figures, bent, doubtful)
    if main:
        _write(measurement, subject, examined, data)
        for unfinished in kept:
            unfinished.finished()
        _show(examined)


def _widest(norm: str, numbers: int) -> float:
    """Return a radius within which no network can be right: every image can become grey.

    numbers: of an image, one a pixel and channel.
    """
    return 0.5 if norm == "linf" else 0.5 * math.sqrt(numbers)


def _parts(
    threat: ThreatOptions, seed: int, classes: int, transfer: str | None, widest: float
) -> Iterator[Part]:
    """Yield what is run, wider and wider balls last."""
    yield Part(["natural", "noise", "fgsm", "pgd-10", _STRONGEST])
    yield Part([_STRONGEST], ", margin", {"loss": "margin"})
    if classes >= 3:
        yield Part([_STRONGEST], ", dlr", {"loss": "dlr"})
    yield Part(["pgd-10"], ", another seed", {"seed": seed + 1})
    yield Part(["square"])
    yield Part(["autoattack"])
    if transfer:
        yield Part([transfer])
    radius = threat.eps
    while 0 < radius < widest:
        radius = min(2 * radius, widest)
        yield Part(["pgd-20"], f", eps {pixels(radius)}", {"step_size": None}, radius)


def _options(own: EvalOptions, part: Part) -> EvalOptions:
    """Return the section `eval` of a part."""
    changes = {"loss": "ce", "attacks": list(part.attacks), "limit": own.limit or IMAGES}
    return own.model_copy(update={**changes, **part.changes})


def _transfer(second: nn.Module) -> Any:
    """Return an attack, as somebody's own is made, by PGD-50 on another network."""

    class Transfer:
        class Options(AttackOptions):
            """None."""

        def __init__(self, options: AttackOptions, threat: Threat) -> None:
            self.threat, self.pgd = threat, PGD(50, threat.eps / 4)

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
            return x + self.pgd(second, x, y, self.threat, keys).delta

    return Transfer


def _alignment(measurement: Measurement, model: nn.Module, data: Dataset) -> float:
    config, accelerator = measurement.config, measurement.accelerator
    threat = build_threat(config.threat.norm, config.threat.eps)
    options = _options(config.eval, Part([]))
    tally = Tally(accelerator, "alignment", 1, None)
    images = Images(data, options, accelerator, lambda: None)
    for x, y, _ in images.chunks(tally):
        tally.add(alignment(model, x, y, threat).sum())
    return tally.totals()[0] / images.n


def _write(measurement: Measurement, subject: Subject, examined: Examined, data: Dataset) -> None:
    reasons = examined.reasons()
    content = {
        "verdict": "suspicious" if reasons else "consistent",
        "because": reasons,
        "alignment": examined.alignment,
        "figures": {name: result.record() for name, result in examined.figures.items()},
        "dataset": measurement.config.data.name,
        "images": data.known_by(),
        "threat": measurement.config.threat.model_dump(include={"norm", "eps"}),
        **subject.about,
        **subject.identity,
    }
    text = json.dumps(content, indent=1)
    files.replace(measurement.folder.thorough, text.encode())


def _show(examined: Examined) -> None:
    table = Table("attack", "accuracy", "95 % interval", "n", "seconds")
    for name, result in examined.figures.items():
        low, high = wilson(result.correct, result.n)
        shared = "" if result.measured_in == result.attack else " (shared)"
        cells = [f"{result.accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{result.n:,}"]
        table.add_row(name, *cells, f"{result.seconds:.1f}{shared}")
    console = Console()
    console.print(table)
    console.print(f"alignment of input gradients within the ball: {examined.alignment:.2f}")
    reasons = examined.reasons()
    if not reasons:
        console.print("consistent: nothing here says that the attacks fail on this network")
        return
    console.print("suspicious, because")
    for reason in reasons:
        console.print(f"- {reason}", soft_wrap=True)
