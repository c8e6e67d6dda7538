"""The configuration of a run: typed sections, YAML files that extend others, overrides.

`load_config` is the only way in. What a user can get wrong raises UserError with one line that
names the file or key and the remedy.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from dist_adv.attacks.spec import parse_attack
from dist_adv.data.datasets import DataOptions
from dist_adv.errors import UserError
from dist_adv.methods import MethodChoice
from dist_adv.models import ModelOptions, PreActResNet18Options
from dist_adv.options import Options, PositiveInt, Real, StepSize
from dist_adv.schedule import Schedule
from dist_adv.text import nearest

_MAX_EPS = {"linf": 1.0, "l2": 8.0}


class ThreatOptions(Options):
    """The ball of the adversary; `eps` in pixel units of [0, 1]."""

    norm: Literal["linf", "l2"] = "linf"
    eps: Real = 8 / 255

    @model_validator(mode="after")
    def _pixel_units(self) -> "ThreatOptions":
        if self.eps < 0:
            raise ValueError(f"eps: {self.eps:g} is negative; a radius is 0 or more, like 8/255")
        if self.eps >= _MAX_EPS[self.norm]:
            raise ValueError(
                f"eps: {self.eps:g} is too large a radius in pixel units of [0, 1]; "
                f"did you mean {self.eps:g}/255?"
            )
        return self


class OptimOptions(Options):
    """SGD and its schedule over all optimiser steps of the run.

    rise: the share of the run in which the rate of `cyclic` rises; short runs like 0.25.
    """

    lr: Annotated[Real, Field(gt=0)] = 0.2
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[Real, Field(ge=0)] = 5e-4
    schedule: Schedule = "cyclic"
    rise: Annotated[Real, Field(gt=0, lt=1)] = 0.5
    cycle_momentum: bool = False
    """Momentum m -> m - 0.1 -> m over the run, as torch's CyclicLR does unless told otherwise."""

    @model_validator(mode="after")
    def _momentum_to_cycle(self) -> "OptimOptions":
        if self.cycle_momentum and self.momentum < 0.1:
            raise ValueError("cycle_momentum: needs a momentum of at least 0.1 to take 0.1 from")
        return self


Minutes = Annotated[Real, Field(gt=0)]


class TrainOptions(Options):
    """How long, how large, how precise.

    epochs: passes over the data (Free's replays come on top). batch_size: the global batch.
    max_steps: stop at the first batch boundary at or after this many optimiser steps; the
    schedule is fitted to it. log_every: batches between two lines of metrics. compile: `default`
    fuses the network's layers with torch.compile, which takes a minute or two at the start and a
    C++ compiler; `max` tunes longer and on GPUs replays whole passes as CUDA graphs.
    sync_batchnorm: BatchNorm's statistics are of the global batch instead of each rank's share (on
    GPUs). deterministic: cuDNN takes algorithms that give the same bits each time, so that a run
    on GPUs goes on bit for bit, too; false: the fastest, found out by timing them. CPUs always do.
    threads: CPU threads of a rank (null: the cores divided by the ranks).

    Checkpoints come at the end of every pass, and every `save_steps` optimiser steps and every
    `save_minutes` (null: not); `keep` of them stay. max_minutes: save and leave after so long, to
    be started again. on_nan: an update whose loss or gradient is not finite is not taken; then
    the run stops, or skips up to `skip_limit` of them. timeout_minutes: a rank without progress
    for so long ends the run, saying where it hangs.
    """

    epochs: PositiveInt = 45
    batch_size: PositiveInt = 128
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["none", "default", "max"] = "none"
    sync_batchnorm: bool = False
    deterministic: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    max_steps: PositiveInt | None = None
    keep: PositiveInt = 2
    save_steps: PositiveInt | None = None
    save_minutes: Minutes | None = 10.0
    max_minutes: Minutes | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    skip_limit: PositiveInt = 10
    timeout_minutes: Minutes = 10.0
    log_every: PositiveInt = 50
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None


def _attack_names(names: list[str]) -> list[str]:
    for name in names:
        parse_attack(name)
    return names


class EvalOptions(Options):
    """What is measured, always in eval mode and fp32.

    attacks: of the final weights, on the whole test set (or `limit` images of it).
    every: after every so many passes, the curve: natural, fgsm and `curve_attack` on
    `curve_limit` test images; 0 never. step_size: of PGD, in pixel units (null: eps / 4).
    """

    attacks: list[str] = ["natural", "fgsm", "pgd-10", "pgd-20", "pgd-50"]
    limit: PositiveInt | None = None
    step_size: StepSize | None = None
    loss: Literal["ce", "margin", "dlr"] = "ce"
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: PositiveInt = 500
    every: Annotated[int, Field(ge=0)] = 1
    curve_attack: str = "pgd-10"
    curve_limit: PositiveInt | None = 1000

    @field_validator("attacks")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        return _attack_names(names)

    @field_validator("curve_attack")
    @classmethod
    def _curve_known(cls, name: str) -> str:
        if parse_attack(name).kind != "pgd":
            raise ValueError(f"{name!r} has no PGD steps; use for example 'pgd-10'")
        return name


class WandbOptions(Options):
    """Weights & Biases. `auto` is online where a key is known and offline elsewhere.

    name: null is the run folder's name. tags: none is method, data set and model. W&B's own
    environment variables (WANDB_PROJECT, WANDB_RUN_GROUP, ...) go before what is said here.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: Annotated[str, Field(max_length=128, pattern=r"^[^/\\#?%:]+$")] = "dist-adv"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str = "train"
    notes: str | None = None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []


class TrackOptions(Options):
    """Where metrics go besides metrics.jsonl and results.jsonl."""

    wandb: WandbOptions = WandbOptions()
    tensorboard: bool = False


class Config(Options):
    """A whole experiment."""

    method: MethodChoice
    threat: ThreatOptions = ThreatOptions()
    model: ModelOptions = PreActResNet18Options()
    data: DataOptions = DataOptions()
    optim: OptimOptions = OptimOptions()
    train: TrainOptions = TrainOptions()
    eval: EvalOptions = EvalOptions()
    track: TrackOptions = TrackOptions()

    @model_validator(mode="after")
    def _something_to_synchronise(self) -> "Config":
        if self.train.sync_batchnorm and self.model.norm != "batch":
            raise ValueError("train.sync_batchnorm: there is no BatchNorm with model.norm=group")
        return self

    def dump(self) -> str:
        """The resolved configuration as YAML, which `load_config` reads back to the same."""
        return to_yaml(self.model_dump())


# Differences in these do not change what is trained, so a run goes on in spite of them. The data
# may have moved; whether they are the same is not seen from where they lie.
_FREE_TO_CHANGE = (
    "track.",
    "eval.",
    "data.root",
    "data.resident_gb",
    "data.workers",
    *(
        f"train.{key}"
        for key in (
            "deterministic",
            "keep",
            "log_every",
            "max_minutes",
            "on_nan",
            "save_minutes",
            "save_steps",
        )
    ),
    *(f"train.{key}" for key in ("skip_limit", "threads", "timeout_minutes")),
)
# More of these is a longer run; less is another one.
_FREE_TO_GROW = ("train.epochs", "train.max_steps")


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key that is not the same."""
    before, after = flatten(old.model_dump()), flatten(new.model_dump())
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def longer(old: Config, new: Config) -> list[str]:
    """The differences by which a run gets longer; what is trained is the same until then."""
    before, after = flatten(old.model_dump()), flatten(new.model_dump())
    # null: no limit
    grown = [key for key in _FREE_TO_GROW if _limit(after[key]) > _limit(before[key])]
    return [line for line in differences(old, new) if line.split(":")[0] in grown]


def training_differences(old: Config, new: Config) -> list[str]:
    """The differences that change what is trained."""
    allowed = longer(old, new)
    return [
        line
        for line in differences(old, new)
        if line not in allowed and not line.startswith(_FREE_TO_CHANGE)
    ]


def _limit(value: int | None) -> float:
    return math.inf if value is None else value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{'train.epochs': 3}` for `{'train': {'epochs': 3}}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, and a number is what people take it for.

    To YAML 1.1, and so to PyYAML, 010 is 8 and 1:30 is 90. Here leading zeros mean nothing, as in
    YAML 1.2, and 1:30 is text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if tag not in (_INT, _FLOAT)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, because merge keys (<<) are resolved into repeated ones afterwards.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = node.value.replace("_", "").lower()
        base = {"0x": 16, "0b": 2}.get(digits.lstrip("+-")[:2], 10)
        return int(digits, base)


class _Dumper(yaml.SafeDumper):
    """YAML that both `_Loader` and YAML 1.1 read back to the same: the text 08 is in quotes."""


_Loader.add_constructor(_INT, _Loader.construct_yaml_int)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        _INT, re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$"), list("-+0123456789")
    )
    _class.add_implicit_resolver(
        _FLOAT,
        re.compile(
            r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?$"
            r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    )


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return a mapping as YAML, which `read_mapping` reads back to the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML lets Python's own errors through: a date of month 13, brackets without end.
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{source}:{place} not valid YAML ({problem}): {_shown(text)}") from None


def _shown(text: str) -> str:
    line = text.strip().split("\n")[0]
    return repr(line if len(line) <= 40 else line[:40] + "...")


def read_mapping(path: Path, needs: str, wanted: str = "") -> dict[str, Any]:
    """The mapping that a YAML file holds; `needs` and `wanted` are for what is said of others."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file{wanted}; see configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        raise UserError(f"{path}: is empty; it needs at least {needs!r}")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is no mapping of keys; it needs at least {needs!r}")
    return tree


def _read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a file with everything that it extends."""
    here = Path(os.path.realpath(path))  # Path.resolve raises for a link to itself
    if here in seen:
        raise UserError(f"{path}: extends itself; remove the circle of 'extends'")
    wanted = f" (which {seen[-1]} extends)" if seen else ""
    tree = read_mapping(path, "method: {name: fast}", wanted)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: must be one file name, relative to this file")
    return _merge(_read_file(path.parent / base, (*seen, here)), tree)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, section by section.

    A section with another `name` (another method, model or data set) replaces the whole section:
    the keys of a Free method mean nothing to a Fast one.
    """
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        same_kind = (
            isinstance(old, dict)
            and isinstance(value, dict)
            and value.get("name", old.get("name")) == old.get("name")
        )
        merged[key] = _merge(old, value) if same_kind else value  # type: ignore[arg-type]
    return merged


def _overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """`['train.epochs=3']` as a tree."""
    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise UserError(f"{assignment!r} is no override; write key.path=value: train.epochs=3")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{key}: {parent} is set to a single value by another override")
        node[leaf] = _parse_yaml(text, key)
    return tree


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a file and what it extends, apply `key.path=value` overrides, check everything.

    path: None where the overrides say all that differs from the defaults.

    Raises UserError naming the file and the key, with the nearest known name where there is one.
    """
    tree = _merge(_read_file(Path(path)) if path else {}, _overrides(overrides))
    return parse_config(tree, str(path or "overrides"))


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Check a whole configuration; `source` is named in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(detail, tree) for detail in error.errors()]
    raise UserError(f"{source}: " + "; ".join(dict.fromkeys(problems)))


def _explain(error: ErrorDetails, tree: Mapping[str, Any]) -> str:
    """One problem as 'key: what is wrong; what to do'."""
    # A section that is one of several kinds has its kind in the location: drop it.
    names = {str(section.get("name")) for section in tree.values() if isinstance(section, dict)}
    place = [str(part) for part in error["loc"]]
    key = ".".join([*place[:1], *(p for i, p in enumerate(place[1:]) if i > 0 or p not in names)])
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_elsewhere(place, tree)}"
        case "missing":
            return f"{key}: missing; a method is needed: 'method: {{name: fast}}'"
        case "union_tag_invalid":
            kinds = re.findall("'(.*?)'", context["expected_tags"])
            found = context["tag"]
            return f"{key}.name: {found!r} is not known{nearest(found, kinds)}"
        case "union_tag_not_found":
            return f"{key}.name: missing{nearest('', _kinds(place[0]))}"
        case "literal_error":
            found = error["input"]
            kinds = re.findall("'(.*?)'", context["expected"])
            return f"{key}: {found!r} is not known{nearest(str(found), kinds)}"
        case "model_type" | "model_attributes_type":
            return f"{key}: is a section with keys of its own, not {error['input']!r}"
        case "value_error":
            reason = str(context["error"])
            return f"{key}.{reason}" if _names_a_key(reason) else f"{key}: {reason}"
        case _:
            return f"{key}: {error['msg'].lower()} (it is {error['input']!r}){_remedy(error, key)}"


def _remedy(error: ErrorDetails, key: str) -> str:
    """What to write for a value of another type than the key's."""
    value = error["input"]
    match error["type"]:
        case "string_type" if isinstance(value, bool | int | float | date):
            # In a list the last part of the key is the number of the element.
            return f"; put it in quotes, in a shell in two kinds: {key}='\"{value}\"'"
        case "list_type" if isinstance(value, str):
            return f"; write it in brackets: {key}=[{value}]"
        case "int_type" if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
            return f"; write it without quotes: {key}={value}"
        case "bool_type":
            return "; write true or false"
        case _:
            return ""


def _elsewhere(place: list[str], tree: Mapping[str, Any]) -> str:
    """Where a key that is not known at `place` is one: in another section, or nearly so here."""
    chosen = {
        name: {"name": section["name"]}
        for name, section in tree.items()
        if isinstance(section, Mapping) and "name" in section
    }
    natural = {"method": {"name": "natural"}}
    try:
        known = Config.model_validate({**natural, **chosen})
    except ValidationError:
        known = Config.model_validate(natural)
    keys = flatten(known.model_dump())
    homes = [key for key in keys if key.split(".")[-1] == place[-1]]
    if homes:
        return f"; did you mean {' or '.join(map(repr, homes))}?"
    return nearest(place[-1], _known_keys(place[:-1]))


def _names_a_key(reason: str) -> bool:
    """Checks of a whole section start with the key that they are about."""
    return reason.split(":")[0].isidentifier() and ":" in reason


def _known_keys(place: list[str]) -> list[str]:
    """The keys of the section at `place`, from the JSON Schema."""
    schema = Config.model_json_schema()
    node: dict[str, Any] = schema
    for part in place:
        node = node.get("properties", {}).get(part) or _kind(schema, node, part)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return list(node.get("properties", {}))


def _kind(schema: dict[str, Any], node: dict[str, Any], name: str) -> dict[str, Any]:
    return {"$ref": node.get("discriminator", {}).get("mapping", {}).get(name, "")}


def _kinds(section: str) -> list[str]:
    """The names that a section of several kinds can have."""
    return list(Config.model_json_schema()["properties"][section]["discriminator"]["mapping"])


def json_schema() -> dict[str, Any]:
    """A JSON Schema for editors: a file may leave out whatever it extends or has a default."""
    schema = Config.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        section.pop("required", None)
        for field in section.get("properties", {}).values():
            field.pop("discriminator", None)
            if "oneOf" in field:  # a file that leaves `name` to its base may fit several kinds
                field["anyOf"] = field.pop("oneOf")
    schema["properties"]["extends"] = {"type": "string", "description": "A file to start from."}
    return schema


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
