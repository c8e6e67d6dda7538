"""What YAML makes of a configuration: merge keys, numbers, text that looks like something else."""

import json
import math
from pathlib import Path

import pytest
import yaml

from dist_adv.config import load_config
from dist_adv.config.loading import read_mapping
from dist_adv.config.yaml_text import parse_yaml, to_yaml
from dist_adv.errors import UserError
from dist_adv.sweeps.sweep import load_sweep

DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"


def read(tmp_path: Path, text: str) -> dict:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return read_mapping(path, "method: {name: fast}")


MERGED = """
data: {name: digits}
eval: &eval {attacks: [natural], limit: 5}
train: &train
  <<: {epochs: 7, seed: 3, batch_size: 9}
  seed: 4
optim:
  nested: {<<: *train, epochs: 1}
  twice: {<<: [*eval, *train], limit: 6}
  again: {<<: *eval}
"""


def test_merge_keys_are_merged_as_by_pyyaml(tmp_path: Path) -> None:
    found = read(tmp_path, MERGED)
    assert found == yaml.safe_load(MERGED)
    assert found["train"] == {"epochs": 7, "seed": 4, "batch_size": 9}
    assert found["optim"]["nested"] == {"epochs": 1, "seed": 4, "batch_size": 9}


def test_a_mapping_merged_before_it_is_read_has_no_key_twice(tmp_path: Path) -> None:
    """PyYAML reads `b` after `c` has taken it over, with the merged keys and its own in it."""
    text = "y: &y {k: 1}\na:\n  b: &b {<<: *y, k: 2}\nc: {<<: *b}\n"
    assert read(tmp_path, text)["c"] == {"k": 2}


def test_a_configuration_and_a_sweep_with_merge_keys(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"extends: {DIGITS}\ntrain:\n  <<: {{epochs: 2, seed: 5}}\n  epochs: 3\n")
    train = load_config(path).train
    assert (train.epochs, train.seed) == (3, 5)
    path.write_text(
        f"base: {DIGITS}\nruns:\n- {{name: a, set: &a {{train.seed: 5}}}}\n"
        "- {name: b, set: {<<: *a, train.epochs: 3}}\n"
    )
    (_, second) = load_sweep(path).runs
    assert (second.config.train.epochs, second.config.train.seed) == (3, 5)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", 3),
        ("a: {<<: {b: 1}, c: 1,\n c: 2}", 2),
        ("a: {<<: {b: 1}, <<: {c: 1}}", 1),
        ('a: {b: 1, "b": 2}', 1),
        ("a: &a {b: 1, b: 1}\nc: {<<: *a}", 1),
    ],
)
def test_a_key_given_twice_is_an_error(text: str, line: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"line {line} .*is given twice"):
        read(tmp_path, text)


@pytest.mark.parametrize("text", ["a: {<<: 3}", "a: {<<: [1]}", "a: <<"])
def test_what_cannot_be_merged_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid YAML") as raised:
        read(tmp_path, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("010", 10), ("08", 8), ("007", 7), ("-010", -10), ("+5", 5), ("0", 0), ("00", 0)],
        *[("1_000", 1000), ("0x10", 16), ("0b11", 3), ("-0x10", -16)],
        *[("0o10", "0o10"), ("1:30", "1:30"), ("190:20:30", "190:20:30"), ("1:30.5", "1:30.5")],
        *[(".5", 0.5), ("5.", 5.0), ("08.5", 8.5), ("1.5e+3", 1500.0), ("-.inf", -math.inf)],
        *[("~", None), ("null", None), ("yes", True), ("off", False), ("1e3", 1000.0)],
        *[("1e-06", 1e-6), ("1.5e3", 1500.0), ("-2E+2", -200.0), ("1e", "1e"), ("e3", "e3")],
        *[
            ('"\\ud83d\\ude42"', "\U0001f642"),
            ('"\\udce9"', "\udce9"),
            ("\U0001f642", "\U0001f642"),
        ],
    ],
)
def test_numbers_are_what_people_take_them_for(text: str, value: object, tmp_path: Path) -> None:
    found = read(tmp_path, f"a: {text}\nb: [{text}]")
    assert found == {"a": value, "b": [value]}
    assert type(found["a"]) is type(value)


@pytest.mark.parametrize("value", [1e-6, 1e16, -2.5e-9, 0.1, "\U0001f642", "caf\udce9", "1e-6"])
def test_json_is_read_as_it_was_meant(value: object) -> None:
    """A sweep hands its runs their values so."""
    assert parse_yaml(json.dumps({"a": value}), "test") == {"a": value}


def test_a_section_that_was_left_out_may_be_wanted_after_all() -> None:
    """What is said later wins."""
    assert load_config(DIGITS, ["average=null", "average.epochs=4"]).average.epochs == 4
    assert load_config(DIGITS, ["average.epochs=4", "average=null"]).average is None


def test_a_seed_with_leading_zeros() -> None:
    assert load_config(DIGITS, ["train.seed=010"]).train.seed == 10
    with pytest.raises(UserError, match=r"train\.seed: .*integer \(it is '1:30'\)"):
        load_config(DIGITS, ["train.seed=1:30"])


@pytest.mark.parametrize(
    "name",
    ["010", "08", "1:30", "1e3", "-.5", "0x10", "1_000", "yes", "~", "2024-01-02", "<<"],
)
def test_text_that_looks_like_a_number_survives_a_dump(name: str, tmp_path: Path) -> None:
    """For the reader of configurations, and for those of YAML 1.1."""
    config = load_config(DIGITS, [f"track.wandb.name='{name}'"])
    assert config.track.wandb.name == name
    (tmp_path / "my.yaml").write_text(config.dump())
    assert load_config(tmp_path / "my.yaml") == config
    assert yaml.safe_load(to_yaml({"a": name})) == {"a": name}


@pytest.mark.parametrize(
    ("assignment", "remedy"),
    [
        ("track.wandb.name=123", "track.wandb.name='\"123\"'"),
        ("track.wandb.name=1.5", "track.wandb.name='\"1.5\"'"),
        ("track.wandb.name=yes", "in quotes"),
        ("track.wandb.name=2024-01-02", "track.wandb.name='\"2024-01-02\"'"),
        ("eval.attacks=natural,pgd-10", "eval.attacks=[natural,pgd-10]"),
        ("track.wandb.tags=a,b", "track.wandb.tags=[a,b]"),
        ("train.epochs='3'", "train.epochs=3"),
    ],
)
def test_a_value_of_another_type_has_its_remedy(assignment: str, remedy: str) -> None:
    """Which is accepted when it is typed as it stands there, a shell's quotes taken away."""
    with pytest.raises(UserError) as raised:
        load_config(DIGITS, [assignment])
    assert remedy in str(raised.value)
    if "=" in remedy:
        load_config(DIGITS, [remedy.replace("'", "")])


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("train.lr=1", "train.lr: unknown key; did you mean 'optim.lr'?"),
        ("lr=1", "lr: unknown key; did you mean 'optim.lr'?"),
        ("optim.batch_size=8", "did you mean 'train.batch_size' or 'eval.batch_size'?"),
        ("train.alpha=0.1", "train.alpha: unknown key; did you mean 'method.alpha'?"),
        ("model.name=wide_resnet train.depth=28", "did you mean 'model.depth'?"),
        ("train.project=a", "did you mean 'track.wandb.project'?"),
        ("train.epoch=3", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("method.name=fsat train.lr=1", "'fast'?; train.lr: unknown key; did you mean 'optim.lr'?"),
    ],
)
def test_a_key_of_another_section_is_found(assignment: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(DIGITS, assignment.split())
    assert said in str(raised.value)
