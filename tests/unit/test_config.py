"""Configurations: what is read, what extends what, and what a user is told about a mistake."""

import json
from pathlib import Path

import pytest
import yaml

from dist_adv.config import load_config, parse_config, training_differences
from dist_adv.config.__main__ import json_schema
from dist_adv.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(
    path
    for path in CONFIGS.glob("*/*.yaml")
    if not path.stem.endswith("base") and path.parent.name != "sweeps"
)


@pytest.fixture
def write(tmp_path):
    """`write(name, text)` makes a file and gives its path."""

    def make(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        ("'8/255'", 8 / 255),
        ("8 / 255", 8 / 255),
        ("0.03", 0.03),
        ("3e-2", 0.03),  # a string to YAML 1.1
        ("3.0e-2", 0.03),
        ("0", 0),
        (".5", 0.5),
    ],
)
def test_numbers_and_fractions(text, value, write):
    config = load_config(write(f"method: {{name: natural}}\nthreat: {{eps: {text}}}"))
    assert config.threat.eps == value


def test_exponent_without_a_point(write):
    """`5e-4` is a number to everybody but YAML."""
    path = write("method: {name: natural}\noptim: {weight_decay: 5e-4}")
    assert load_config(path).optim.weight_decay == 5e-4
    assert load_config(path, ["optim.weight_decay=1e-4"]).optim.weight_decay == 1e-4


@pytest.mark.parametrize(
    "text",
    [
        *("eight", "8/0", "8/255/2", "__import__('os')", "2**3", "1/1e-999", "/255", "8/"),
        *("nan", ".inf", "-.inf", "true", "[1]", "null", "''"),
    ],
)
def test_what_is_no_number(text, write):
    """Fractions are parsed and never evaluated."""
    path = write(f"method: {{name: natural}}\nthreat: {{eps: {text}}}")
    with pytest.raises(UserError, match=r"threat\.eps"):
        load_config(path)


# --- files that extend others --------------------------------------------------------------------


def test_chain_of_files(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write("method: {name: fast}\ntrain: {epochs: 1, seed: 1}\noptim: {lr: 0.1}", "a.yaml")
    write("extends: ../a.yaml\ntrain: {epochs: 2}", "sub/b.yaml")
    path = write("extends: sub/b.yaml\ntrain: {batch_size: 7}", "c.yaml")
    config = load_config(path)
    assert (config.train.epochs, config.train.seed, config.train.batch_size) == (2, 1, 7)
    assert config.method.name == "fast"
    assert config.optim.lr == 0.1


@pytest.mark.parametrize(
    "files", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}]
)
def test_circle_of_files(files, write):
    for name, base in files.items():
        write(f"extends: {base}.yaml\nmethod: {{name: fast}}", f"{name}.yaml")
    with pytest.raises(UserError, match="extends itself"):
        load_config(write("extends: a.yaml", "top.yaml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: absent.yaml", r"absent\.yaml: no such configuration file"),
        ("extends: [a.yaml, b.yaml]", "extends: must be one file name"),
        ("extends: .", "cannot be read"),
        ("", "is empty"),
        ("- fast", "is no mapping of keys"),
        ("method: {name: fast", "line 1 not valid YAML"),
        ("method: {name: fast}\ntrain: {epochs: 1}\ntrain: {epochs: 2}", "'train' is given twice"),
        ("method: {name: fast, alpha: 0.1, alpha: 0.2}", "'alpha' is given twice"),
        ("method: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_file_that_is_no_configuration(text, said, write):
    with pytest.raises(UserError, match=said):
        load_config(write(text))


def test_missing_and_binary_file(tmp_path):
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_section_of_another_name_is_replaced(write):
    """The keys of Free mean nothing to Fast, but a section of the same name is extended."""
    write("method: {name: free, replays: 4}\nmodel: {name: wide_resnet, depth: 28}", "base.yaml")
    other = load_config(write("extends: base.yaml\nmethod: {name: fast}"))
    assert other.method.name == "fast"
    assert other.model.depth == 28
    same = load_config(write("extends: base.yaml\nmethod: {guard: warn}\nmodel: {widen: 2}"))
    assert (same.method.replays, same.method.guard) == (4, "warn")
    assert (same.model.depth, same.model.widen) == (28, 2)
    named = load_config(write("extends: base.yaml\nmethod: {name: free, guard: warn}"))
    assert named.method.replays == 4
    replaced = load_config(write("extends: base.yaml"), ["model.name=resnet50"])
    assert replaced.model.model_dump() == {
        "name": "resnet50",
        "stem": "cifar",
        "width": 64,
        "norm": "batch",
    }


def test_a_name_that_is_no_kind_is_a_key_like_others(write):
    write("method: {name: fast}\ntrack: {wandb: {mode: disabled, project: p}}", "base.yaml")
    for how in (["extends: base.yaml\ntrack: {wandb: {name: x}}"], ["extends: base.yaml"]):
        wandb = load_config(write(*how), ["track.wandb.name=x"]).track.wandb
        assert (wandb.name, wandb.mode, wandb.project) == ("x", "disabled", "p")


def test_the_usual_optimiser_may_be_named(write):
    path = write("method: {name: fast}\noptim: {lr: 0.1, schedule: cosine}")
    assert load_config(path, ["optim.name=sgd"]).optim.lr == 0.1
    other = load_config(path, ["optim.name=adamw", "optim.lr=0.001"]).optim
    assert (other.lr, other.schedule) == (0.001, "cyclic")


def test_mappings_on_the_command_line_are_merged(write):
    path = write("method: {name: fast}\ntrain: {epochs: 45, seed: 3}")
    config = load_config(path, ["train.epochs=3", "train={batch_size: 5}"])
    assert (config.train.epochs, config.train.batch_size, config.train.seed) == (3, 5, 3)
    by_epoch = ["train.batch_size={0: 8}", "train.batch_size={0: 16, 2: 32}"]
    assert load_config(path, by_epoch).train.batch_size == 32


def test_recipe_is_the_same_on_other_images(write):
    """Only which images they are changes, and the size where a set has one of its own."""
    recipe = write("""
method: {name: fast, alpha: 10/255}
data:
  name: imagefolder
  root: birds
  size: {0: 24, 1: 32}
  shorter: 36
  crop_padding: 0
  mixup: 0.2
  validation: 100
  extra: {path: made-up.npz, fraction: 0.3}
""")
    said = load_config(recipe).data
    packed = load_config(recipe, ["data.name=packed", "data.root=dogs"])
    assert packed.data == said.model_copy(update={"name": "packed", "root": "dogs"})
    assert packed.stages[0].data.size == 24
    digits = load_config(recipe, ["data.name=digits"]).data
    assert (digits.root, digits.size, digits.shorter) == (None, None, None)
    assert (digits.crop_padding, digits.mixup, digits.validation) == (0, 0.2, 100)
    assert digits.extra == said.extra
    assert load_config(recipe, ["data.name=imagefolder"]).data == said
    usual = write("method: {name: natural}\ndata: {root: here}", "usual.yaml")
    assert load_config(usual, ["data.name=cifar10"]).data.root == "here"
    hf = load_config(recipe, ["data.name=hf", "data.path=dogs"])
    back = write(hf.dump(), "hf.yaml")
    assert (
        load_config(back, ["data.name=cifar10"]).data
        == load_config(recipe, ["data.name=cifar10"]).data
    )


def test_overrides_go_over_files_and_the_last_one_counts(write):
    write("method: {name: fast, alpha: 0.1}\ntrain: {epochs: 1, seed: 5}", "base.yaml")
    path = write("extends: base.yaml\ntrain: {epochs: 2}")
    config = load_config(
        path,
        [
            "train.epochs=3",
            "method.alpha=10/255",
            "train.epochs=4",
            "eval.attacks=[natural, pgd-3]",
        ],
    )
    assert config.train.epochs == 4
    assert config.train.seed == 5
    assert config.method.alpha == 10 / 255
    assert config.eval.attacks == ["natural", "pgd-3"]
    assert load_config(path, ["train.max_steps=null"]).train.max_steps is None
    assert load_config(path, ["track.wandb.mode=disabled"]).track.wandb.mode == "disabled"


@pytest.mark.parametrize(
    "assignment", ["train.epochs", "=3", "train..epochs=3", ".epochs=3", "train.=3", "fast"]
)
def test_override_that_is_none(assignment):
    with pytest.raises(UserError, match=r"is no override; write key\.path=value"):
        load_config(SHIPPED[0], [assignment])


def test_override_into_a_value():
    with pytest.raises(UserError, match="train is set to a single value"):
        load_config(SHIPPED[0], ["train=3", "train.epochs=3"])
    with pytest.raises(UserError, match=r"train\.epochs: "):
        load_config(SHIPPED[0], ["train.epochs.x=3"])


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("trian.epochs=3", "trian: unknown key; did you mean 'train'"),
        ("train.epoch=3", r"train\.epoch: unknown key; did you mean 'epochs'"),
        ("method.alhpa=0.1", r"method\.alhpa: unknown key; did you mean 'alpha'"),
        ("model.widht=8", r"model\.widht: unknown key; did you mean 'width'"),
        ("track.wandb.projekt=x", r"track\.wandb\.projekt: unknown key; did you mean 'project'"),
        ("average.epoch=3", r"average\.epoch: unknown key; did you mean 'epochs'"),
        ("awp.rho=3", r"awp\.rho: unknown key; choose from gamma, start"),
        ("data.extra.pathh=x", r"data\.extra\.pathh: unknown key; did you mean 'path'"),
        ("method.name=fats", r"method\.name: 'fats' is not known; did you mean 'fast'"),
        ("method={name: adr, share: [0.5]}", r"method\.share\.1: missing; the list is too short"),
        ("optim.milestones=[0.5, 1.5]", r"optim\.milestones\.1: input should be less than 1"),
        ("model.name=resnet", r"model\.name: 'resnet' is not known; did you mean 'resnet50'"),
        ("data.name=cifar", r"data\.name: 'cifar' is not known; did you mean 'cifar10'"),
        ("method.init=randm", r"method\.init: 'randm' is not known; did you mean 'random'"),
        ("optim.schedule=xyz", r"optim\.schedule: 'xyz' is not known; choose from cyclic, "),
        ("eval.attacks=[pdg-10]", r"eval\.attacks: 'pdg-10' is no attack .*mean 'pgd-10'"),
        ("eval.curve_attack=natural", r"eval\.curve_attack: 'natural' has no PGD steps"),
        ("threat.eps=8", r"threat\.eps: 8 is too large .*did you mean 8/255"),
        ("threat.eps=-0.1", r"threat\.eps: -0\.1 is negative"),
        ("method.alpha=10", r"method\.alpha: .*did you mean 10/255"),
        ("method.alpha=0", r"method\.alpha: must be above 0"),
        ("train.epochs=0", r"train\.epochs: .*greater than or equal to 1"),
        ("train.epochs=1.5", r"train\.epochs: .*integer"),
        ("train.epochs='3'", r"train\.epochs: .*integer"),
        ("data.augment=1", r"data\.augment: .*bool"),
        ("train=3", "train: is a section"),
        ("optim.lr=0", r"optim\.lr: .*greater than 0"),
        ("optim.momentum=1", r"optim\.momentum: .*less than 1"),
        ("optim={momentum: 0, cycle_momentum: true}", "cycle_momentum: needs a momentum"),
    ],
)
def test_mistake_is_named_with_its_remedy(assignment, said):
    """One line with the key, and the nearest name that there is."""
    with pytest.raises(UserError, match=said) as raised:
        load_config(CONFIGS / "digits" / "fast.yaml", [assignment])
    assert "\n" not in str(raised.value)
    assert "fast.yaml" in str(raised.value)


def test_all_mistakes_at_once():
    with pytest.raises(UserError) as raised:
        load_config(SHIPPED[0], ["train.epoch=3", "optim.rl=3"])
    assert "train.epoch: unknown" in str(raised.value)
    assert "optim.rl: unknown" in str(raised.value)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({}, "method: missing"),
        ({"method": {"alpha": 0.1}}, r"method\.name: missing"),
        ({"method": "fast"}, "method"),
        ({"method": None}, "method"),
    ],
)
def test_no_method(tree, said):
    with pytest.raises(UserError, match=said):
        parse_config(tree, "here")


def test_l2_radii_may_be_above_1():
    tree = {"method": {"name": "natural"}, "threat": {"norm": "l2", "eps": 1.5}}
    assert parse_config(tree, "here").threat.eps == 1.5
    with pytest.raises(UserError, match="did you mean 128/255"):
        parse_config(tree | {"threat": {"norm": "l2", "eps": 128}}, "here")


# --- what is shipped -----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["digits", "cifar10", "cifar10-small"])
@pytest.mark.parametrize("method", ["natural", "pgd", "free", "fast"])
def test_the_files_that_everybody_knows(folder, method):
    config = load_config(CONFIGS / folder / f"{method}.yaml")
    assert config.method.name == method
    assert config.data.name == folder.removesuffix("-small")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_file_is_valid_and_survives_a_dump(path, write):
    config = load_config(path)
    again = load_config(write(config.dump()))
    assert again == config
    assert again.dump() == config.dump()
    assert training_differences(config, again) == []


def test_dump_is_whole(write):
    """Every default is written down: a later version's defaults do not change an old run."""
    config = load_config(write("method: {name: fast}"))
    written = yaml.safe_load(config.dump())
    assert written == config.model_dump()
    assert {"method", "threat", "model", "data", "optim", "train", "eval", "track"} <= set(written)


def test_schema_file_is_up_to_date():
    """`python -m dist_adv.config > configs/schema.json` makes it."""
    assert json.loads((CONFIGS / "schema.json").read_text()) == json.loads(
        json.dumps(json_schema())
    )


# --- may this run go on? -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "difference"),
    [
        ("track.wandb.mode=offline", None),
        ("track.tensorboard=true", None),
        ("eval.attacks=[natural]", None),
        ("eval.every=3", None),
        ("train.log_every=1", None),
        ("train.keep=9", None),
        ("train.threads=3", None),
        ("data.root=/elsewhere", None),
        ("train.epochs=16", "train.epochs: 45 -> 16"),
        ("train.seed=1", "train.seed: 0 -> 1"),
        ("train.batch_size=32", "train.batch_size: 128 -> 32"),
        ("train.precision=bf16", "train.precision: auto -> bf16"),
        ("train.max_steps=9", "train.max_steps: None -> 9"),
        ("optim.lr=0.1", "optim.lr: 0.2 -> 0.1"),
        ("model.width=16", "model.width: 64 -> 16"),
        ("data.augment=false", "data.augment: True -> False"),
        ("data.name=svhn", "data.name: cifar10 -> svhn"),
        ("threat.eps=0.1", "threat.eps: 0.2 -> 0.1"),
        ("method.alpha=0.2", "method.alpha: 0.25 -> 0.2"),
        ("method.guard=stop", "method.guard: warn -> stop"),
    ],
)
def test_differences_that_change_training(assignment, difference, write):
    path = write("method: {name: fast, alpha: 0.25}\nthreat: {eps: 0.2}\nmodel: {name: resnet50}")
    found = training_differences(load_config(path), load_config(path, [assignment]))
    assert found == ([] if difference is None else [difference])


def test_another_method_is_a_difference():
    fast, free = (parse_config({"method": {"name": name}}, "here") for name in ("fast", "free"))
    found = training_differences(fast, free)
    assert "method.name: fast -> free" in found
    assert "method.replays: None -> 8" in found


def test_the_documented_example_is_accepted(tmp_path):
    """The keys that users were promised, as they were promised."""
    (tmp_path / "base.yaml").write_text("data: {name: digits}\n")
    (tmp_path / "example.yaml").write_text(
        """
extends: base.yaml
method: {name: fast, alpha: 10/255, init: random, guard: warn}
threat: {norm: linf, eps: 8/255}
model:  {name: preact_resnet18, width: 64, norm: batch}
data:   {name: cifar10, root: data, augment: true}
optim:  {lr: 0.2, momentum: 0.9, weight_decay: 5e-4, schedule: cyclic}
train:  {epochs: 45, batch_size: 128, precision: auto, compile: none, seed: 0, max_steps: null}
eval:   {attacks: [natural, pgd-10, pgd-20, pgd-50], every: 1}
track:  {wandb: {project: dist-adv, mode: offline}}
"""
    )
    assert load_config(tmp_path / "example.yaml").train.batch_size == 128


def test_a_section_without_its_name_is_told_the_names(tmp_path):
    (tmp_path / "a.yaml").write_text("method: {name: fast}\n")
    with pytest.raises(UserError, match=r"model\.name: missing; choose from preact_resnet18"):
        load_config(tmp_path / "a.yaml", ["model.width=16"])
