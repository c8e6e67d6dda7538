"""`dist-adv doctor` says what is there, and what to do about what is not; it never fails itself.

The conditions are real where this machine can have them: folders, paths, variables. GPUs and Slurm
are stand-ins, which say so.
"""

import json
import os
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import forked
from dist_adv import cli, plugins
from dist_adv.config import load_config
from dist_adv.distributed.start import start_accelerator
from dist_adv.doctor import Finding, examine
from dist_adv.runs.lock import Lock
from dist_adv.training.trainer import Trainer

DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"
CIFAR10 = DIGITS.parents[1] / "cifar10" / "fast.yaml"
FREE = DIGITS.with_name("free.yaml")


@pytest.fixture(autouse=True)
def plain_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and none of the variables that change what is found."""
    for name in ("DIST_ADV_DATA", "WANDB_MODE", "CXX", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def look(
    what: str, config: Path | None = None, *overrides: str, run_dir: Path = Path("runs")
) -> Finding:
    """The one line about `what`."""
    found = [each for each in examine(config, overrides, run_dir) if each.what == what]
    assert len(found) == 1, found
    return found[0]


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_machine_where_nobody_is_logged_in(tmp_path: Path) -> None:
    """As a process of its own, with an empty home."""
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "NETRC")}
    done = forked.run(
        [sys.executable, "-m", "dist_adv", "doctor", str(CIFAR10), "--json"],
        env=environment | {"HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = {each["what"]: each for each in json.loads(done.stdout)}
    assert found["torch"]["found"].startswith(torch.__version__)
    assert "none" in found["GPUs"]["found"]
    assert "nobody is logged in: records offline" in found["W&B"]["found"]
    assert found["W&B"]["advice"].startswith("`wandb login`")
    assert found["a run here"]["found"].startswith("1 rank on CPU, ")
    assert found["run folder"]["found"] == "runs/cifar10-fast: would be made"
    assert list(tmp_path.iterdir()) == []


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["doctor", str(DIGITS)]) == 0
    table = capsys.readouterr().out
    for word in ("Python", "torch", "CPU", "Slurm", "W&B", "free disk", "/dev/shm", "steps"):
        assert word in table
    assert "problem" not in table


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli._run(["doctor", str(DIGITS), "--run-dir", "file/run"]) == 1
    assert "problem" in capsys.readouterr().out
    found = look("run folder", run_dir=Path("file/run"))
    assert (found.level, found.found) == ("problem", f"file/run: {tmp_path / 'file'} is no folder")


def test_a_mistake_in_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    """One of the lines: the rest of the table is still of use."""
    assert cli._run(["doctor", str(DIGITS), "method.alpa=0.1"]) == 1
    assert "torch" in capsys.readouterr().out
    found = look("configuration", DIGITS, "method.alpa=0.1")
    assert found.level == "problem"
    assert "method.alpa: unknown key; did you mean 'alpha'?" in found.found


def test_a_run_folder_of_this_run_and_of_another(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(load_config(DIGITS).dump())
    (tmp_path / "run" / "status.json").write_text('{"state": "preempted"}')
    same = look("run folder", DIGITS, run_dir=Path("run"))
    assert (same.level, same.found) == (
        "ok",
        "run: holds this run (preempted), which would go on",
    )
    other = look("run folder", DIGITS, "method.alpha=0.1", run_dir=Path("run"))
    assert other.level == "problem"
    assert "method.alpha: 0.25 -> 0.1" in other.found
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "status.json",
    ]


def test_a_run_folder_in_use(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(load_config(DIGITS).dump())
    lock = Lock(run)
    found = look("run folder", DIGITS, run_dir=Path("run"))
    assert (found.level, found.found) == ("problem", "run: is in use by another process")
    lock.release()
    assert look("run folder", DIGITS, run_dir=Path("run")).level == "ok"


def test_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of installed packages, here a stand-in's metadata: what works, and what fails to import."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken.py").write_text("import absent")
    points = {
        name: EntryPoint(name, value, "dist_adv.methods")
        for name, value in (("again", "dist_adv.methods.fast:Fast"), ("broken", "broken:Mine"))
    }
    monkeypatch.setattr(
        plugins, "installed", lambda group: points if group == "dist_adv.methods" else {}
    )
    good, bad = (each for each in examine(None, (), Path("runs")) if each.what == "plug-ins")
    assert (good.found, good.level) == ("methods: again", "ok")
    assert bad.level == "warning"
    assert "'broken' cannot be imported" in bad.found


def test_a_mode_of_wandb_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    found = look("W&B", DIGITS)
    assert found.level == "problem"
    assert found.found.startswith("WANDB_MODE: 'ofline' in the environment is not known; did you")


def test_without_slurm_and_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look("Slurm").found == "no sbatch on this machine"
    assert look("C++ compiler", DIGITS).level == "ok"
    compiling = look("C++ compiler", DIGITS, "train.compile=default")
    assert (compiling.level, compiling.found) == ("problem", "no g++")
    assert compiling.advice.endswith("or set train.compile=none")
    compiling = look("C++ compiler", DIGITS, "train.compile=default", "eval.compile=default")
    assert compiling.advice.endswith("or set train.compile=none eval.compile=none")


def test_graphs_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = look("a run here", DIGITS, "train.compile=graphs")
    assert (found.level, found.found[-11:]) == ("problem", "use default")


def test_slurm_by_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `sinfo` that is none: one that answers, then one that fails."""
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / "sbatch", "exit 0")
    program(tmp_path / "sinfo", "echo 'gpu* 4 nodes, gpu:a100:8, up to 1-00:00:00'")
    found = look("Slurm")
    assert (found.level, found.found) == ("ok", "gpu* 4 nodes, gpu:a100:8, up to 1-00:00:00")
    program(tmp_path / "sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert look("Slurm").level == "warning"


def test_gpus_by_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `nvidia-smi` that is none, and a torch that is told of two GPUs."""
    program(tmp_path / "nvidia-smi", "echo 580.65.06; echo 580.65.06")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    unseen = look("GPUs")
    assert (unseen.level, unseen.found) == (
        "warning",
        "2 (driver 580.65.06), of which torch sees none",
    )
    gpu = SimpleNamespace(name="Stand-in 2070", total_memory=8e9, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu.name)
    assert look("GPU 1").found == ("Stand-in 2070, 8 GB, compute capability 7.5, driver 580.65.06")
    use = look("a run here", CIFAR10)
    assert use.found == "1 rank on Stand-in 2070, fp16"
    assert use.advice == "launch/run.sh starts 2 ranks, one for each GPU"
    assert look("a run here", CIFAR10, "train.precision=bf16").level == "problem"


def test_data(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = look("data", CIFAR10)
    assert (absent.level, absent.found) == (
        "warning",
        f"cifar10 is not in {tmp_path / 'data'}: it would be downloaded",
    )
    no_folder = look("data", DIGITS, "data.name=imagefolder")
    assert no_folder.level == "problem"
    assert "train/<class>/" in no_folder.advice
    assert look("data", DIGITS, "data.name=imagefolder", f"data.root={images}").level == "ok"
    assert look("data").found == f"nothing in {tmp_path / 'data'}"
    (tmp_path / "sets" / "cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.setenv("DIST_ADV_DATA", "sets")
    assert look("data").found == f"cifar10 in {tmp_path / 'sets'}"
    assert look("data", CIFAR10).level == "ok"


@pytest.mark.parametrize(
    ("overrides", "variables", "says"),
    [
        (["train.precision=fp16"], {}, "train.precision: fp16 needs a GPU"),
        (["train.batch_size=49999"], {}, "train.batch_size: leaves a rank 1 image"),
        ([], {"OMP_NUM_THREADS": "two"}, "OMP_NUM_THREADS: 'two'"),
    ],
)
def test_what_would_stop_training(
    overrides: list[str],
    variables: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = examine(CIFAR10, overrides, Path("runs"))
    problems = [each.found for each in found if each.level == "problem"]
    assert len(problems) == 1
    assert problems[0].startswith(says)


@pytest.mark.parametrize(
    "overrides", [[], ["data.drop_last=true"], ["data.validation=99", "train.batch_size=50"]]
)
def test_steps_are_those_of_training(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(FREE, [*overrides, "model.width=4"])
    steps = Trainer(config, start_accelerator(threads=1)).learner.total_steps
    assert look("steps", FREE, *overrides).found.startswith(f"{steps}: ")


def test_steps_that_end_a_run_whose_values_change() -> None:
    found = look("steps", FREE, "train.max_steps=20", "threat.eps={0: 0.1, 1: 0.2}")
    assert found.level != "problem"
    assert found.found.endswith("train.max_steps ends it at 20")


def test_torch_and_torchvision_of_different_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision that cannot be imported, for another reason than in real life."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = look("torch")
    assert found.level == "problem"
    assert "one and the same build" in found.advice


def test_a_look_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    found = look("W&B")
    assert found.level == "warning"
    assert found.found.startswith("could not be looked at: ")
