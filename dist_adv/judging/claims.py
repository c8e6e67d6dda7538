"""Claims: figures with everything that it takes to believe them, or to refute them.

claim.json holds it for programs, with a checksum of its content; claim.md is the same for people.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from dist_adv import files
from dist_adv.attacks.threat import build as build_threat
from dist_adv.config import Config, Judged, differences, flatten, load, load_config
from dist_adv.data import Dataset, load_dataset, place_key
from dist_adv.data.fingerprint import in_words
from dist_adv.distributed.collectives import on_every
from dist_adv.distributed.failures import plain_failures
from dist_adv.distributed.start import start_accelerator
from dist_adv.errors import RunFailure, UserError
from dist_adv.evaluation.display import EvaluationDisplay
from dist_adv.evaluation.evaluate import Supervision, evaluate
from dist_adv.evaluation.results import Result
from dist_adv.exports.card import rows
from dist_adv.files import Record
from dist_adv.judging.measurement import load_test_images
from dist_adv.judging.network import digest_of, load_network
from dist_adv.models import load_model, read_final
from dist_adv.runs import reading
from dist_adv.runs.folder import RunFolder
from dist_adv.terminal import bar, start_logging
from dist_adv.text import pixels

# Of env.json: what is said elsewhere, or is of the training alone.
_NO_CIRCUMSTANCES = ("dataset", "method", "total_steps", "precision", "weights", "source")
IMAGES = 200
"""Of a check, unless somebody asks for more."""


class Claim(BaseModel):
    """What is claimed.

    network: what it is, and the SHA-256 of its weights. data: name, split, images and their
    fingerprint. figures: lines of results.jsonl. doubts: their flags. examined: the verdict of an
    examination, where there was one. made_with: versions, commit, hardware. commands: measure the
    figures again, those of the same settings together.
    """

    model_config = ConfigDict(extra="forbid")

    network: dict[str, Any]
    data: dict[str, Any]
    threat: dict[str, Any]
    figures: list[dict[str, Any]]
    doubts: list[str]
    examined: str | None
    made_with: dict[str, Any]
    commands: list[str]
    sha256: str = ""

    def checksum(self) -> str:
        """Return the SHA-256 of all the rest."""
        content = self.model_dump(exclude={"sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Subject:
    """A folder of a run or of somebody's network, as a claim needs it."""

    folder: RunFolder
    config: Config | Judged

    def load(self) -> nn.Module:
        if isinstance(self.config, Judged):
            return load_network(self.config.model)
        return load_model(self.folder.path)

    def network(self) -> dict[str, Any]:
        """Return what the network is. Raises UserError where there are no weights."""
        if isinstance(self.config, Judged):
            return self.config.model.model_dump()
        about = read_final(self.folder.weights)
        return {key: about[key] for key in ("model", "mean", "std", "trained")}

    def verdict(self, weights: str) -> str | None:
        """Return that of an examination of these weights within the folder's threat and on its own
        test images, else None.

        weights: their digest, for a network that is no run's, whose file has its own.
        """
        judged = isinstance(self.config, Judged)
        now = weights if judged else files.sha256(self.folder.weights)
        threat, name = self.config.threat.model_dump(include={"norm", "eps"}), self.config.data.name
        try:
            found = json.loads(self.folder.thorough.read_text())
            alike = (found["weights"], found["threat"], found["dataset"]) == (now, threat, name)
            own = reading.own_images(self.folder.path, name)
            if alike and reading.same_images(own, found.get("images", {})):
                return "; ".join([found["verdict"], *found["because"]])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there was none, or it is damaged
        return None

    def command(self, figures: Sequence[Record], images: int) -> str:
        """Return what measures figures of the same settings again. images: of the test set."""
        words = ["dist-adv", "eval", str(self.folder)]
        if isinstance(self.config, Judged):
            model = self.config.model
            words = ["dist-adv", "eval", "--model", model.reference]
            for key, value in model.args.items():
                words += ["--model-args", f"{key}={json.dumps(value)}"]
            fresh = Judged(model=model)
            changed = {line.split(":")[0] for line in differences(fresh, self.config)}
            now = flatten(self.config.model_dump())
            words += [
                f"{key}={json.dumps(now[key])}"
                for key in sorted(changed)
                if key.startswith(("data.", "threat.")) and key != "data.root"
            ]
        words += ["--attacks", ",".join(figure["attack"] for figure in figures)]
        for key, value in settings(figures[0]).items():
            words += [f"eval.{key}={json.dumps(value)}"]
        n = figures[0]["n"]
        if n < images:
            words += ["--limit", str(n)]
        elif self.config.eval.limit:  # of the folder's own, which an evaluation went beyond
            words += ["eval.limit=null"]
        return shlex.join(words)


def settings(figure: Record) -> dict[str, Any]:
    """Return the keys of `eval` that a figure was measured with; none of natural accuracy."""
    keys = {"loss": "loss_fn", "step_size": "step_size", "seed": "seed"}
    found = {key: figure[name] for key, name in keys.items() if name in figure}
    if figure["attack"] == "fgsm":
        found["step_size"] = None
    if options := figure.get("options"):
        found["attack_options"] = {figure["attack"]: options}
    return found


def alike(figures: Sequence[Record]) -> Iterator[list[Record]]:
    """Yield figures that one evaluation gives: of the same settings, on as many images."""

    def key(figure: Record) -> str:
        return json.dumps([settings(figure), figure["n"]])

    for _, group in groupby(sorted(figures, key=key), key=key):
        yield list(group)


def read_subject(folder: Path) -> Subject:
    """Return what a folder is of. Raises UserError where it is neither a run's nor a network's."""
    run = RunFolder(folder)
    if run.judged.is_file():
        return Subject(run, load(run.judged, [], Judged))
    if run.config.is_file():
        return Subject(run, load_config(run.config))
    raise UserError(f"{folder}: is no run folder, and nothing was judged there; name one")


def make_claim(folder: Path, overrides: Sequence[str]) -> Path:
    """Write claim.json and claim.md of what was measured, into its folder; return the page.

    overrides: of `data`, where the images lie elsewhere here.

    Raises UserError where nothing was, or the test images are not those that it was measured on.
    """
    subject = read_subject(folder)
    config = _with(subject, overrides)
    threat = {"norm": config.threat.norm, "eps": config.threat.eps}
    figures = list(reading.read_results(folder, threat, config.data.name).figures.values())
    if not any(figure.attack != "natural" for figure in figures):
        raise UserError(f"{folder}: no attack was run within its threat; dist-adv eval runs them")
    data = load_dataset(config.data, "test")
    measured_on = {figure.record.get("fingerprint") for figure in figures} - {None}
    if measured_on - {in_words(data.fingerprint)}:
        raise UserError(
            f"{place_key(config.data.name)}: {config.data.name} has other test images than those "
            f"of the figures; evaluate again"
        )
    weights = digest_of(subject.load())
    lines = [dict(figure.record) for figure in figures]
    claim = Claim(
        network=subject.network() | {"sha256": weights},
        data={
            **config.data.model_dump(include={"name", "size", "shorter"}, exclude_none=True),
            "split": "test",
            "images": len(data),
            "classes": len(data.classes),
            "fingerprint": in_words(data.fingerprint),
        },
        threat=threat,
        figures=lines,
        doubts=[f"{figure.attack}: {flag}" for figure in figures for flag in figure.flags],
        examined=subject.verdict(weights),
        made_with={
            key: value
            for key, value in reading.read_environment(folder).items()
            if key not in _NO_CIRCUMSTANCES
        },
        commands=[subject.command(group, len(data)) for group in alike(lines)],
    )
    claim.sha256 = claim.checksum()
    page = subject.folder.claim.with_suffix(".md")
    files.replace(subject.folder.claim, claim.model_dump_json(indent=1).encode())
    files.replace(page, _page(claim, figures).encode())
    return page


def _page(claim: Claim, figures: Sequence[reading.Evaluation]) -> str:
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows(figures))
    doubts = "\n".join(f"- {each}" for each in claim.doubts) or "None was raised."
    made_with = {**claim.made_with, **claim.made_with.get("hardware", {})}
    made_with.pop("hardware", None)
    data, threat = claim.data, claim.threat
    return f"""# Robust accuracy: a claim

Within {threat["norm"]} {pixels(threat["eps"])} in pixel units of [0, 1], on the test images of
{data["name"]} ({data["images"]:,} of {data["classes"]} classes, fingerprint {data["fingerprint"]}).

{table}

Eval mode, fp32; an image counts as robust where no iterate of any restart is misclassified.

## What looks wrong

{doubts}

Examination (`dist-adv eval --thorough`): {claim.examined or "none was made"}.

## The network

```json
{json.dumps(claim.network, indent=1)}
```

## Made with

{chr(10).join(f"- {key}: {value}" for key, value in made_with.items())}

## Again

```bash
{chr(10).join(claim.commands)}
dist-adv claim --check claim.json     # a sample of it, with the same weights and images
```

SHA-256 of claim.json's content: {claim.sha256}
"""


def check_claim(file: Path, overrides: Sequence[str], limit: int | None) -> Iterator[str]:
    """Measure a sample of a claim again, with the network of the folder that the claim lies in.

    Every rank calls this. Yields a line for each thing that holds.

    Args:
        file: claim.json. overrides: of `data`, where the images lie elsewhere here.
        limit: images of the sample.

    Raises:
        UserError: the file is none, or was edited; its folder has no network.
        RunFailure: the claim does not hold, and why.
    """
    claim = _read(file)
    yield "the file is as it was written"
    subject = read_subject(file.parent)
    config = _with(subject, overrides)
    accelerator = start_accelerator("fp32")
    start_logging(accelerator.is_main_process)
    with plain_failures(accelerator, "eval.batch_size", config.eval.batch_size):
        network = on_every(accelerator, subject.load)
        data = load_test_images(config, accelerator)
        for what, claimed, found in (
            ("weights", claim.network["sha256"], digest_of(network)),
            ("test images", claim.data["fingerprint"], in_words(data.fingerprint)),
        ):
            if claimed != found:
                raise RunFailure(
                    f"{file}: does not hold: the {what} are others ({claimed}; here {found})"
                )
            yield f"the {what} are the same"
        for result, figure in _sample(claim, config, network, data, limit, accelerator):
            expected, slack = _expected(figure, result.n)
            line = f"{result.attack}: {result.correct} of {result.n} right, {expected:.1f} expected"
            if abs(result.correct - expected) > slack:
                raise RunFailure(f"{file}: does not hold: {line}, give or take {slack:.1f}")
            yield line


def _read(file: Path) -> Claim:
    try:
        claim = Claim.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a claim.json") from None
    except ValidationError:
        raise UserError(f"{file}: is no claim; name what dist-adv claim wrote") from None
    if claim.sha256 != claim.checksum():
        raise UserError(f"{file}: was edited after it was written; ask for the file as it was")
    return claim


def _with(subject: Subject, overrides: Sequence[str]) -> Config | Judged:
    """Return the folder's configuration, with its images where they lie here.

    Raises UserError for what a claim would pass over.
    """
    judged = isinstance(subject.config, Judged)
    config = (
        load(subject.folder.judged, overrides, Judged)
        if judged
        else load_config(subject.folder.config, overrides)
    )
    for line in differences(subject.config, config):
        if not line.startswith(("data.", "eval.batch_size:")):
            raise UserError(
                f"{line} is none of a claim's, whose figures were measured as they were; leave it "
                f"out, or set something of data, or eval.batch_size"
            )
    return config


def _sample(
    claim: Claim,
    config: Config | Judged,
    network: nn.Module,
    data: Dataset,
    limit: int | None,
    accelerator: Accelerator,
) -> Iterator[tuple[Result, Record]]:
    """Yield each figure on a sample of its images, with the claim's line."""
    network.to(accelerator.device)
    threat = build_threat(claim.threat["norm"], claim.threat["eps"])
    for figures in alike(claim.figures):
        changes = {
            "attacks": [figure["attack"] for figure in figures],
            "limit": min(limit or IMAGES, figures[0]["n"]),
            **settings(figures[0]),
        }
        options = config.eval.model_copy(update=changes)
        with bar(accelerator.is_main_process) as progress:
            supervision = Supervision(EvaluationDisplay(progress).update)
            results, _ = evaluate(network, data, threat, options, accelerator, supervision)
        yield from zip(results, figures, strict=True)


def _expected(figure: Record, n: int) -> tuple[float, float]:
    """Return how many of n images are right where the claim holds, and how many more or fewer.

    A sample without replacement, at four standard deviations; and what another machine's rounding
    does to an image in two hundred.
    """
    share, all_images = figure["accuracy"], figure["n"]
    variance = n * share * (1 - share) * (all_images - n) / max(1, all_images - 1)
    return n * share, 4 * math.sqrt(variance) + max(1, n / 200)
