"""A sweep file: which runs it describes, what it is called, and whose folder it is."""

import os
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from dist_adv.config import load_config
from dist_adv.errors import UserError
from dist_adv.sweeps.sweep import Sweep, as_wandb, claim, load_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = CONFIGS / "digits"


def sweep(folder: Path, text: str, *overrides: str) -> Sweep:
    path = folder / "mine.yaml"
    path.write_text(text)
    return load_sweep(path, overrides)


def names(sweep: Sweep) -> list[str]:
    return [run.name for run in sweep.runs]


def test_a_grid_is_every_combination_over_its_base(tmp_path: Path) -> None:
    found = sweep(
        tmp_path,
        f"""
        base: {os.path.relpath(DIGITS / "fast.yaml", tmp_path)}
        set: {{train.epochs: 3, train.seed: 9}}
        grid: {{method.alpha: [10/255, 0.1], train.batch_size: [32, 64]}}
        """,
        "train.seed=7",
    )
    assert found.name == "mine"
    assert names(found) == [
        "alpha-10_255-batch_size-32",
        "alpha-10_255-batch_size-64",
        "alpha-0.1-batch_size-32",
        "alpha-0.1-batch_size-64",
    ]
    common = ["train.epochs=3", "train.seed=7"]
    assert [run.config for run in found.runs] == [
        load_config(
            DIGITS / "fast.yaml", [*common, f"method.alpha={alpha}", f"train.batch_size={batch}"]
        )
        for alpha in ("10/255", "0.1")
        for batch in (32, 64)
    ]


def test_named_runs_follow_the_grid_and_have_their_own_base(tmp_path: Path) -> None:
    found = sweep(
        tmp_path,
        f"""
        base: {DIGITS}/free.yaml
        set: {{train.epochs: 3}}
        grid: {{method.replays: [2]}}
        runs:
          - {{name: pgd-7, base: {DIGITS}/pgd.yaml}}
          - {{name: long, set: {{train: {{epochs: 5}}, "track.wandb.name": "007"}}}}
        """,
    )
    assert names(found) == ["replays-2", "pgd-7", "long"]
    assert [run.config.method.name for run in found.runs] == ["free", "pgd", "free"]
    assert [run.config.train.epochs for run in found.runs] == [3, 3, 5]
    assert found.find("long").config.track.wandb.name == "007"  # quoted, so no number
    assert found.find("1") is found.find("pgd-7") is found.runs[1]


def test_what_a_run_sets_is_over_what_the_file_sets(tmp_path: Path) -> None:
    """Key by key, however deep they are written."""
    found = sweep(
        tmp_path,
        f"""
        base: {DIGITS}/fast.yaml
        set: {{train: {{epochs: 3, seed: 5}}}}
        runs:
          - {{name: a, set: {{train: {{batch_size: 64}}}}}}
          - {{name: b, set: {{train.seed: 6}}}}
        """,
    )
    trains = [run.config.train for run in found.runs]
    assert [(each.epochs, each.seed) for each in trains] == [(3, 5), (3, 6)]
    assert trains[0].batch_size == 64


def test_keys_with_the_same_last_part_are_told_apart(tmp_path: Path) -> None:
    grid = "grid: {model.norm: [batch], threat.norm: [l2], eval.attacks: [[natural, pgd-10]]}"
    found = sweep(tmp_path, f"base: {DIGITS}/fast.yaml\nset: {{threat.eps: 0.5}}\n{grid}")
    assert names(found) == ["model.norm-batch-threat.norm-l2-attacks-natural_pgd-10"]


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").iterdir()), ids=lambda path: path.stem)
def test_every_sweep_that_comes_along_is_sound(path: Path) -> None:
    assert load_sweep(path).runs
    assert f"dist-adv sweep configs/sweeps/{path.name}" in path.read_text()


def test_what_is_saved_describes_the_same_runs(tmp_path: Path) -> None:
    first = load_sweep(CONFIGS / "sweeps/fast_alpha_batch.yaml", ["optim.weight_decay=1e-5"])
    claim(first, tmp_path / "out")
    assert load_sweep(tmp_path / "out/sweep.yaml").runs == first.runs


def test_a_folder_has_one_sweep(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = f"base: {DIGITS}/fast.yaml\ngrid: {{train.seed: [0, 1]}}"
    claim(sweep(tmp_path, text), out)
    saved = (out / "sweep.yaml").read_bytes()
    refused = {
        "run 1 is 'seed-1' there and missing here": sweep(tmp_path, text.replace(", 1", "")),
        "run 2 is missing there and 'seed-2' here": sweep(tmp_path, text.replace("1]", "1, 2]")),
        "run 'seed-0': method.alpha: 0.25 -> 0.2": sweep(tmp_path, text, "method.alpha=0.2"),
    }
    for reason, other in refused.items():
        with pytest.raises(UserError, match=f"out: holds another sweep \\({reason}"):
            claim(other, out)
    assert (out / "sweep.yaml").read_bytes() == saved
    claim(sweep(tmp_path, text, "eval.every=0", "train.epochs=99"), out)  # as a run may change
    assert load_sweep(out / "sweep.yaml").runs[1].config.train.epochs == 99


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and no sweep's folder; choose another --out"):
        claim(load_sweep(CONFIGS / "sweeps/digits.yaml"), tmp_path)
    with pytest.raises(UserError, match=r"thesis\.tex: cannot be a sweep's folder"):
        claim(load_sweep(CONFIGS / "sweeps/digits.yaml"), tmp_path / "thesis.tex")


def test_a_wandb_agent_makes_commands_of_ours(tmp_path: Path) -> None:
    """By the functions of the agent itself: which command it would start for each value."""
    wandb_agent = import_module("wandb.sdk.launch.sweeps.utils")  # here: it takes two seconds
    path = CONFIGS / "sweeps/digits.yaml"
    found = load_sweep(path)
    tree = yaml.safe_load(as_wandb(found, path, ["train.epochs=3"], Path("out")))
    assert (tree["method"], list(tree["parameters"])) == ("grid", ["only"])
    assert tree["parameters"]["only"]["values"] == names(found)
    arguments = wandb_agent.create_sweep_command_args({"args": {"only": {"value": "free"}}})
    fill = arguments | {"env": ["/usr/bin/env"], "interpreter": ["python"]}
    words = [
        word
        for part in wandb_agent.create_sweep_command(tree["command"])
        for word in (fill[part[2:-1]] if part.startswith("${") else [part])
    ]
    assert words[:6] == ["/usr/bin/env", "python", "-m", "dist_adv", "sweep", str(path)]
    assert words[6:] == ["train.epochs=3", "--out", "out", "--only=free"]
