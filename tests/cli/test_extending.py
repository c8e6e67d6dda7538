"""The package of docs/extending.md, installed outside the tree: trained, killed, judged."""

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import forked
import stranger
from dist_adv import load_model, plugins
from dist_adv.config import load_config, parse_config
from dist_adv.errors import UserError
from dist_adv.training.run import train_run
from launch import Job

pytestmark = [pytest.mark.slow, pytest.mark.shares]
SMALL = {"eval.every=0", "train.save_steps=1", "train.keep=100", "train.threads=1"}


@pytest.fixture(scope="module")
def site(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return once("stranger", lambda folder: stranger.install(folder / "site")) / "site"


@pytest.fixture(scope="module")
def trained(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The document's configuration, trained on two ranks."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "config.yaml").write_text(yaml.safe_dump(stranger.configuration()))
    start(folder, site, "whole").finish()
    return folder


def start(folder: Path, site: Path, run: str, *arguments: str, ranks: int = 2) -> Job:
    config = folder / "config.yaml"
    path = {"PYTHONPATH": str(site)}
    return Job(config, folder / run, ranks, (*sorted(SMALL), *arguments), env=path)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    left, right = weights(one), weights(two)
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


def test_a_run_is_what_its_pieces_make_it(trained: Path) -> None:
    run = trained / "whole"
    env = json.loads((run / "env.json").read_text())
    method = {"title": "Margin", "settings": "alpha 10/255, margin 2", "steps": 1, "passes": 5.0}
    assert env["method"].items() >= method.items()
    assert env["dataset"]["classes"] == ["rows", "columns"]
    assert {name.split(":")[1] for name in env["sources"]} == {
        *("Margin", "Plain", "Stripes", "falling", "Corners", "Lines")
    }
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    figures = {each["attack"]: each for each in results}
    corners = figures["mine.attacks:Corners"]
    assert (corners["options"], corners["n"], corners["flags"]) == ({"tries": 4}, 300, [])
    lines = (run / "lines.txt").read_text().splitlines()
    assert lines[-2].startswith("epoch")
    assert "mine.attacks:Corners" in lines[-1]
    rates = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rates[-1]["lr"] == pytest.approx(0.1 * (1 - 17 / 18) ** 2)


def test_killed_it_goes_on_bit_for_bit(trained: Path, site: Path) -> None:
    job = start(trained, site, "killed")
    assert job.wait_for_checkpoint(8)
    job.kill()
    start(trained, site, "killed").finish()
    assert same(trained / "whole", trained / "killed")


def test_changed_source_goes_on_only_when_told_to(
    trained: Path, site: Path, tmp_path: Path
) -> None:
    shutil.copytree(site, tmp_path / "site")
    method = tmp_path / "site" / "mine" / "methods.py"
    method.write_text(method.read_text() + "\n# changed\n")
    shutil.copytree(trained / "whole", trained / "longer")
    (trained / "longer" / "model.safetensors").unlink()
    job = start(trained, tmp_path / "site", "longer", ranks=1)
    assert job.wait() == 2
    assert re.search(r"trained with another source of .*mine\.methods:Margin", job.output())
    told = str(trained / "whole" / "checkpoints" / "step-000000012")
    again = start(trained, tmp_path / "site", "told", "--resume", told, ranks=1)
    again.finish()
    assert "going on with another source of" in again.output()


def test_judged_and_exported(trained: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own attack is asked for by name; its weights are read where its module is imported."""
    dist_adv = [sys.executable, "-m", "dist_adv"]
    env = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    for command in (
        ["eval", "whole", "--attacks", "mine.attacks:Corners,fgsm", "--limit", "50"],
        ["export", "whole", "--out", "exported"],
        ["export", "whole", "--out", "program", "--format", "torch-export"],
    ):
        forked.run([*dist_adv, *command], cwd=trained, env=env, check=True)
    monkeypatch.setattr(plugins, "_FOUND", {})
    monkeypatch.delitem(sys.modules, "mine.networks", raising=False)
    with pytest.raises(
        UserError, match=r"is not imported for a file; 'import mine.networks' first"
    ):
        load_model(trained / "exported")
    monkeypatch.syspath_prepend(str(site))
    importlib.import_module("mine.networks")
    assert "AdaptiveAvgPool2d" in str(load_model(trained / "exported"))


def test_short_names_of_an_installed_package(
    trained: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(site))
    plugins.installed.cache_clear()
    tree = load_config(trained / "whole" / "config.yaml").model_dump()
    for section, name in (("method", "margin"), ("model", "plain"), ("data", "stripes")):
        tree[section]["name"] = name
    tree["train"]["precision"] = "fp32"  # as this process has it
    tree["eval"] |= {"attacks": ["corners"], "attack_options": {"corners": {"tries": 1}}}
    train_run(parse_config(tree, "short"), tmp_path / "short", "none")
    alone = load_config(trained / "whole" / "config.yaml", ["train.precision=fp32"])
    train_run(alone, tmp_path / "long", "none")
    assert same(tmp_path / "short", tmp_path / "long")
    with pytest.raises(UserError, match="'margn' is not known; did you mean 'margin'"):
        parse_config({"method": {"name": "margn"}}, "test")
    assert load_model(tmp_path / "short").architecture["model"]["name"] == "plain"
    importlib.invalidate_caches()
    plugins.installed.cache_clear()


def test_the_program(site: Path, tmp_path: Path) -> None:
    """On a network of torchvision and tensors that this project has never seen."""
    text = (site / "from_python.py").read_text()
    (tmp_path / "shorter.py").write_text(text.replace('"epochs": 4', '"epochs": 2'))
    program = [sys.executable, "shorter.py"]
    done = forked.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^(natural|fgsm|pgd-10-2): ([\d.]+)% of 60 images", done.stdout, re.M)
    assert [name for name, _ in found] == ["natural", "fgsm", "pgd-10-2"]
