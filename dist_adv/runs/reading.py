"""The one reader of what a run has left: its configuration, its log, its figures.

Nothing here needs torch.

Lines of results.jsonl are added and never replaced, at whatever settings somebody asked for. A
run's figure under an attack is, of the lines

- of its final weights,
- on its own data set and within its own threat (`data.name`, `threat.norm`, `threat.eps`),

the one on the most images, and among those the last: a quick look with `--limit` displaces nothing,
and an evaluation of all images again, perhaps with another loss or step size, counts instead of
the earlier one. Whoever shows a figure shows the settings beside it.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from dist_adv import files
from dist_adv.by_epoch import at_the_end
from dist_adv.errors import UserError
from dist_adv.files import Record
from dist_adv.options import Real
from dist_adv.runs.folder import RunFolder
from dist_adv.text import few, one_line

SWEEP = "sweep.yaml"


class _Section(BaseModel, extra="allow"):
    """Keys that are not named here stay what they are."""


class _Named(_Section):
    name: str


class _Method(_Named):
    alpha: Real | None = None


class _Threat(_Section):
    norm: str
    eps: Real


class _Training(_Section):
    epochs: int
    batch_size: int
    precision: str
    seed: int


class _Configuration(_Section):
    """What is read of config.yaml without asking whether it is there."""

    method: _Method
    threat: _Threat
    model: _Named
    data: _Named
    train: _Training


class _Hardware(_Section):
    device: str | None = None
    name: str | None = None
    cores: int | None = None
    threads: int | None = None


class _DataSet(_Section):
    name: str | None = None
    train: int | None = None
    test: int | None = None
    classes: list[str] = []
    fingerprint: str | None = None
    size: list[int] | None = None
    shorter: int | None = None


class _Environment(_Section):
    """What is read of env.json where it is there."""

    precision: str | None = None
    world_size: int | None = None
    total_steps: int | None = None
    hardware: _Hardware = _Hardware()
    dataset: _DataSet = _DataSet()
    by_epoch: dict[Annotated[str, Field(pattern="^[0-9]+$")], str] = {}


class _Logged(TypedDict):
    """What is read of each line of metrics; other keys may be there, as of a later version."""

    epoch: float
    step: int
    seconds: float
    images_per_s: NotRequired[float]


class _Pass(_Logged):
    """What is read of a line that closes an epoch. A loss that is not finite is NaN or null."""

    train_loss: float | None
    train_accuracy: float
    test_loss: NotRequired[float | None]
    test_accuracy: NotRequired[float]
    fgsm_loss: NotRequired[float | None]
    fgsm_accuracy: NotRequired[float]
    pgd_loss: NotRequired[float | None]
    pgd_accuracy: NotRequired[float]
    guard_accuracy: NotRequired[float]
    guard_tripped: NotRequired[bool]
    curve_attack: NotRequired[str]
    curve_n: NotRequired[int]
    curve_split: NotRequired[str]


_KINDS: Mapping[Any, TypeAdapter[Any]] = {
    "train": TypeAdapter(_Logged),
    "epoch": TypeAdapter(_Pass),
}
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Line(TypedDict):
    """What is read of a line; other keys may be there, as of a later version."""

    attack: str
    accuracy: Annotated[float, Field(ge=0, le=1)]
    ci95: Annotated[list[_Number], Field(min_length=2, max_length=2)]
    n: Annotated[int, Field(ge=1)]
    step: NotRequired[int]
    flags: NotRequired[list[str]]
    norm: NotRequired[str]
    eps: NotRequired[_Number]
    step_size: NotRequired[_Number | None]
    dataset: NotRequired[str]


_LINE = TypeAdapter(_Line)


@dataclass(frozen=True)
class Evaluation:
    """The final weights under one attack ("natural" is the attack that changes nothing)."""

    attack: str
    accuracy: float
    interval: tuple[float, float]  # 95 %, of the accuracy
    n: int
    flags: tuple[str, ...]  # warnings of the evaluation about itself
    record: Mapping[str, Any]  # the whole line, with the attack's settings


@dataclass(frozen=True)
class Results:
    """figures: by attack. elsewhere: how many lines are of another threat or other data."""

    figures: Mapping[str, Evaluation]
    elsewhere: int


@dataclass(frozen=True)
class Metrics:
    """lines: in the order of their steps, what a resumed run repeated only once. last: of all."""

    lines: Sequence[Record]
    last: Record | None


def kind_of(folder: Path) -> Literal["run", "sweep", ""]:
    """Return what a folder is by its configuration; '' for all else that is there.

    Raises UserError where there is nothing of that name, or it cannot be looked into.
    """
    try:
        if RunFolder(folder).config.is_file():
            return "run"
        if (folder / SWEEP).is_file():
            return "sweep"
        folder.stat()
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no such run folder; check the path") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check the path") from None
    return ""


def find_runs(named: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the run folders among `named`, those of sweeps included, and what is passed over.

    A shell's `runs/*` names reports and logs, too. Raises UserError where nothing is a run, and as
    `kind_of` does.
    """
    runs, others = [], []
    for path in named:
        match kind_of(path):
            case "run":
                runs.append(path)
            case "sweep":
                members = (path / name for name in names_in_sweep(path))
                runs += [run for run in members if run.exists() and kind_of(run) == "run"]
            case _:
                others.append(path)
    if not runs:
        who = (
            f"{named[0]}: is no run folder" if len(named) == 1 else "none of these is a run folder"
        )
        raise UserError(f"{who} (with a config.yaml) nor a sweep's; name one that training wrote")
    return runs, others


def passed_over(others: Sequence[Path]) -> str:
    """Return the line that says which of the named folders are no runs."""
    return f"passed over, no run folders: {few([str(path) for path in others])}"


def names_in_sweep(folder: Path) -> list[str]:
    """Return the names of a sweep's runs in their order. Raises UserError for a damaged file."""
    path = folder / SWEEP
    try:
        return [
            str(run["name"]) for run in yaml.safe_load(path.read_text(encoding="utf-8"))["runs"]
        ]
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore it") from None


def read_config(run_dir: Path) -> Mapping[str, Any]:
    """Return the sections of config.yaml. Raises UserError where one that is needed is missing."""
    path = RunFolder(run_dir).config
    try:
        tree = yaml.safe_load(_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({one_line(error)}); restore the file") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: no mapping of keys; restore the file that training wrote")
    return _checked(at_the_end(tree), _Configuration, path)


def read_environment(run_dir: Path) -> Mapping[str, Any]:
    """Return env.json: versions, hardware, data. Raises UserError where it is no such file."""
    path = RunFolder(run_dir).environment
    try:
        tree = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)}); restore the file") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object; restore the file that training wrote")
    return _checked(tree, _Environment, path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing, so this is not a run folder; name a folder that training wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore the file") from None


def _checked(tree: Any, kind: type[_Section], path: Path) -> Mapping[str, Any]:
    try:
        return kind.model_validate(tree).model_dump(exclude_unset=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"]))
    what = "missing" if problem["type"] == "missing" else f"wrong ({problem['msg'].lower()})"
    raise UserError(f"{path}: {key} is {what}; restore the file that training wrote")


def read_metrics(run_dir: Path, kinds: Collection[str] = tuple(_KINDS)) -> Metrics:
    """Return the log of training, of which only lines of `kinds` are kept.

    Raises UserError naming the first line that is none of training's.
    """
    path = RunFolder(run_dir).metrics
    latest: dict[tuple[str, int], Record] = {}
    last = None
    for number, record in files.read(path):
        kind = record.get("kind")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise UserError(f"{path}: line {number} is of unknown kind {kind!r}; remove the line")
        files.check(record, _KINDS[kind], path, number)
        step = record["step"]
        if last and step < last["step"]:
            # Resumed from an older checkpoint: what was logged beyond it is void.
            latest = {key: old for key, old in latest.items() if key[1] <= step}
        if kind in kinds:
            latest[kind, step] = record
        last = record
    return Metrics(list(latest.values()), last)


def last_metrics(run_dir: Path, holding: str) -> Record | None:
    """Return the last whole line of metrics with the key `holding`, read from the end."""
    with suppress(OSError):
        for line in files.backwards(RunFolder(run_dir).metrics):
            if holding.encode() not in line:
                continue
            with suppress(
                ValueError, RecursionError, KeyError, TypeError
            ):  # torn, or none of training's
                record = json.loads(line)
                _KINDS[record["kind"]].validate_python(record, strict=True)
                if holding in record:
                    return record
    return None


def read_results(run_dir: Path, threat: Mapping[str, Any], dataset: str) -> Results:
    """Return the figures of a run that trained within `threat` (norm, eps) on `dataset`.

    Those on other images than its own test images, or on these at another size, do not count.

    Raises UserError naming the first line that is no evaluation.
    """
    path = RunFolder(run_dir).results
    lines: list[Record] = []
    for number, record in files.read(path):
        files.check(record, _LINE, path, number)
        lines.append(record)
    own = own_images(run_dir, dataset, lines)
    furthest = max((line.get("step", 0) for line in lines), default=0)
    if RunFolder(run_dir).weights_of_shorter_run(furthest).exists():
        return Results({}, 0)  # the run was made longer, and is not evaluated yet
    figures: dict[str, Evaluation] = {}
    elsewhere = 0
    for line in lines:
        if line.get("step", 0) != furthest:
            continue
        if not _at_home(line, threat, dataset, own):
            elsewhere += 1
            continue
        earlier = figures.get(line["attack"])
        if earlier is None or line["n"] >= earlier.n:
            figures[line["attack"]] = _evaluation(line)
    return Results(figures, elsewhere)


def strongest(figures: Mapping[str, Evaluation]) -> Evaluation | None:
    """Return the figure of the lowest robust accuracy; None where no attack was run."""
    attacked = [figure for figure in figures.values() if figure.attack != "natural"]
    return min(attacked, key=lambda figure: figure.accuracy, default=None)


def own_images(
    run_dir: Path, dataset: str, lines: Sequence[Record] | None = None
) -> Mapping[str, Any]:
    """Return fingerprint and size of a run's own test images, as far as they are known.

    Training writes them down. Where it did not, as in earlier versions, they are those of the first
    of its evaluations (`lines` of results.jsonl) on `dataset`.
    """
    with suppress(UserError):
        found = read_environment(run_dir).get("dataset", {})
        if found.get("fingerprint"):
            return found
    if lines is None:
        lines = [record for _, record in files.read(RunFolder(run_dir).results)]
    named = (line for line in lines if line.get("dataset", dataset) == dataset)
    return next((line for line in named if line.get("fingerprint")), {})


def same_images(own: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Compare fingerprints and sizes, as far as both are known."""
    pairs = [(own.get(key), others.get(key)) for key in ("fingerprint", "size", "shorter")]
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def _at_home(
    line: Mapping[str, Any], threat: Mapping[str, Any], dataset: str, own: Mapping[str, Any]
) -> bool:
    """Tell whether a line is of the run's own threat and images; natural accuracy has no ball."""
    return (
        line.get("dataset", dataset) == dataset
        and same_images(own, line)
        and line.get("norm", threat["norm"]) == threat["norm"]
        and math.isclose(line.get("eps", threat["eps"]), threat["eps"], rel_tol=1e-9)
    )


def _evaluation(line: Mapping[str, Any]) -> Evaluation:
    low, high = line["ci95"]
    return Evaluation(
        attack=line["attack"],
        accuracy=line["accuracy"],
        interval=(low, high),
        n=line["n"],
        flags=tuple(line.get("flags", ())),
        record=line,
    )
