"""Every command, and every kind of path that leads nowhere: one line, status 2, nothing written.

In this process, and with permissions that count for root, too. A command that has another place
for a path gets a row in PLACES.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_adv import cli, load_model
from dist_adv.config import load_config
from dist_adv.data import DataOptions, data_root
from dist_adv.training.run import train_run
from permissions import no_override

DIGITS = Path(__file__).parents[2] / "configs" / "digits"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TINY = [
    *("train.max_steps=1", "train.batch_size=512", "train.precision=fp32", "train.threads=1"),
    *("model.width=2", "eval.attacks=[natural]", "eval.every=0"),
]

# What is in the place of a path. `run` and `closed/run` are runs; nobody may enter `closed`, nor
# write to `frozen/run`.
LONG = "x" * 300
READ = ("taken/run", LONG, f"{LONG}/run", "loop", "loop/run", "closed", "closed/run")
WRITTEN = (*READ, "frozen/new")

AS_IS = "--as preact_resnet18 --normalise none data.name=digits"
# BAD stands for the path.
PLACES = {
    "train CONFIG": ("train BAD", READ),
    "train --run-dir": (f"train {DIGITS}/fast.yaml TINY --run-dir BAD", WRITTEN),
    "train --resume": (f"train {DIGITS}/fast.yaml TINY --run-dir new --resume BAD", READ),
    "eval": ("eval BAD", (*READ, "frozen/run")),
    "sync": ("sync BAD --offline new", READ),
    "sync --offline": ("sync run --offline BAD", WRITTEN),
    "sweep": ("sweep BAD --out new", READ),
    "sweep --out": ("sweep sweep.yaml --out BAD", WRITTEN),
    "sweep --only --out": ("sweep sweep.yaml --only 0 --out BAD", WRITTEN),
    "demo": ("demo --out BAD", WRITTEN),
    "status": ("status BAD", READ),
    "report": ("report BAD --out new", READ),
    "report --out": ("report run --out BAD", WRITTEN),
    "export": ("export BAD --out new", READ),
    "export --out": ("export run --out BAD", WRITTEN),
    "import": (f"import BAD {AS_IS} --out new", READ),
    "import --out": (f"import theirs.pt {AS_IS} --out BAD", WRITTEN),
    "bench --out": ("bench --quick --only nothing --out BAD", (LONG, "loop", "closed/run")),
    "plan": ("plan BAD", READ),
    "plan --step-times": (f"plan {DIGITS}/fast.yaml --bandwidth 10 --step-times BAD", READ),
    "plan --json": (
        f"plan {DIGITS}/fast.yaml --bandwidth 10 --step-ms 64:9 --gpus 2 --json BAD",
        (LONG, "loop", "closed", "closed/run"),
    ),
    "dashboard": ("dashboard --out BAD", (LONG, "loop", "closed/run")),
    "extends": ("train extends-BAD.yaml --run-dir new", ("loop", "closed/run")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with one of each kind."""
    path = tmp_path_factory.mktemp("paths")
    train_run(load_config(DIGITS / "fast.yaml", TINY), path / "run", "none")
    for name in ("closed", "frozen"):
        shutil.copytree(path / "run", path / name / "run")
    (path / "taken").write_text("a file")
    (path / "loop").symlink_to("loop")
    (path / "sweep.yaml").write_text(
        f"base: {DIGITS}/fast.yaml\ngrid: {{train.seed: [0, 1]}}\nset: "
        + json.dumps({"model.width": 2, "train.max_steps": 1})
    )
    for bad in ("loop", "closed/run"):
        extending = path / f"extends-{bad}.yaml"
        extending.parent.mkdir(exist_ok=True)
        extending.write_text(f"extends: {path / bad}")
    (path / "closed").chmod(0)
    (path / "frozen" / "run").chmod(0o555)
    (path / "frozen").chmod(0o555)
    yield path
    for name in ("closed", "frozen", "frozen/run"):
        (path / name).chmod(0o755)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("command", "bad"),
    [
        pytest.param(command, bad, id=f"{place}={bad.replace(LONG, 'LONG')}")
        for place, (command, kinds) in PLACES.items()
        for bad in kinds
    ],
)
def test_one_line(
    command: str,
    bad: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in (*LAUNCHER, "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(folder)
    before = names(folder)
    words = command.replace("TINY", " ".join(TINY)).split()
    with no_override():
        status = cli._run([word.replace("BAD", bad) for word in words])
    said = capfd.readouterr()
    complaints = [line for line in said.err.splitlines() if line.startswith("dist-adv: ")]
    assert len(complaints) == 1, said.err
    assert said.err.splitlines()[-1] == complaints[0]
    assert "Traceback" not in said.err
    assert bad in complaints[0]
    assert status == 2
    assert names(folder) == before


def test_home_directory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ~ that the shell has left alone: in options with =, in configurations, in Python."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    assert cli._run(["export", "~/run", "--out=~/exported"]) == 0
    resume = "--resume=~/run/checkpoints/step-000000001"
    assert cli._run(["train", f"{DIGITS}/fast.yaml", *TINY, "--run-dir=~/again", resume]) == 0
    assert (folder / "again" / "model.safetensors").is_file()
    load_model("~/exported")
    assert data_root(DataOptions(root="~/images")) == folder / "images"
    monkeypatch.setenv("DIST_ADV_DATA", "~/images")
    assert data_root(DataOptions()) == folder / "images"
    for name in ("exported", "again"):
        shutil.rmtree(folder / name)
    assert list(tmp_path.iterdir()) == []
