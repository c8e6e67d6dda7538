"""What reaches W&B's server, for which `wandb_server` stands in: each line once."""

import json
import shutil
from pathlib import Path

import pytest
import wandb
from click.testing import CliRunner

import cases
from dist_adv import cli
from dist_adv.config import parse_config
from dist_adv.runs.run import read_runs
from dist_adv.tracking.wandb_run import place
from dist_adv.training.run import train_run
from serving import serving
from wandb_server import Server

pytestmark = pytest.mark.slow


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    with serving(Server()) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()  # it reads the environment once
        yield server


def check(server: Server, run_dir: Path) -> None:
    """The server has every line, and the images, once, in order, under the run's one id."""
    (run,) = read_runs([run_dir])
    ((id, rows),) = server.rows.items()
    assert id == json.loads((run_dir / "wandb" / "run.json").read_text())["id"]
    places = [place(line["step"], line["kind"]) for line in run.metrics]
    assert [row["_step"] for row in rows] == [*places, place(run.steps, "final")]
    by_step = {row["_step"]: row for row in rows}
    for line in run.metrics:
        kind = line["kind"]
        loss = "loss" if kind == "train" else "pgd_loss"
        row = by_step[place(line["step"], kind)]
        assert row[f"{kind}/{loss}"] == line[loss]
        assert ("epoch/examples" in row) == (kind == "epoch")


def test_resumed_and_pushed_again(images: Path, tmp_path: Path, server: Server, undrawn: None):
    tree = cases.config("fast-random", "batch", images, small=True)
    tree["eval"] = {"attacks": ["natural", "pgd-2"], "every": 1, "curve_attack": "pgd-1"}
    tree["train"] = {**tree["train"], "log_every": 1}
    config = parse_config({**tree, "track": {"wandb": {"mode": "online"}}}, "online")
    run_dir = tmp_path / "run"
    train_run(config, run_dir, "none")
    check(server, run_dir)
    inputs = [each["input"] for name, each in server.asked if name == "CreateArtifact"]
    assert sorted(each["artifactTypeName"] for each in inputs) == ["model", "report"]

    # As if it had been killed in the second epoch: it does that again.
    shutil.rmtree(run_dir / "checkpoints" / "step-000000008")
    for name in ("model.safetensors", "results.jsonl"):
        (run_dir / name).unlink()
    train_run(config, run_dir, "auto")
    check(server, run_dir)

    # Pushed from the folder, where W&B has all of it, the beginning, or nothing.
    for lost in (slice(0), slice(6, None), slice(None)):
        ((_, rows),) = server.rows.items()
        del rows[lost]
        result = CliRunner().invoke(cli.cli, ["sync", str(run_dir)])
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"run: {server.url}/")
        check(server, run_dir)
