"""`launch/kubernetes/trainjob.yaml` and `launch/skypilot/train.yaml`: valid, and what they start is
run here, by a real torchrun on two 'machines', which are both this one.

**No cluster and no cloud is asked.**
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api import models

import forked
from launch import free_port, status

ROOT = Path(__file__).parents[2]
RUNTIME, TRAINJOB = yaml.safe_load_all(
    (ROOT / "launch" / "kubernetes" / "trainjob.yaml").read_text()
)
TASK = yaml.safe_load((ROOT / "launch" / "skypilot" / "train.yaml").read_text())
SHORT = """\
extends: {root}/configs/digits/fast.yaml
model: {{width: 4}}
train: {{max_steps: 2, batch_size: 512}}
eval: {{attacks: [natural], every: 0}}
"""


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A configuration of two steps."""
    path = tmp_path / "short.yaml"
    path.write_text(SHORT.format(root=ROOT))
    return path


def train_on_two_machines(commands: list[tuple[list[str], dict[str, str]]], run_dir: Path) -> None:
    """Run what each machine starts, with its variables; it must end as a run of two ranks."""
    jobs = [
        forked.Popen(
            command,
            cwd=run_dir.parent,  # no checkout: what is installed runs
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, env in commands
    ]
    try:
        for job in jobs:
            said, _ = job.communicate(timeout=120)
            assert job.returncode == 0, said[-3000:]
    finally:
        for job in jobs:
            job.kill()
    assert status(run_dir)["state"] == "done"
    assert json.loads((run_dir / "env.json").read_text())["world_size"] == 2


def test_kubernetes_reads_all_of_it() -> None:
    """Trainer's own models drop keys that they do not know."""
    for kind, given in (("TrainingRuntime", RUNTIME), ("TrainJob", TRAINJOB)):
        assert given["kind"] == kind
        model = getattr(models, f"TrainerV1alpha1{kind}")
        assert model.from_dict(given).to_dict() == given
    reference = TRAINJOB["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (RUNTIME["kind"], RUNTIME["metadata"]["name"])


def test_kubernetes_starts_again_what_was_evicted() -> None:
    """All pods, in the time that a checkpoint takes, and not counted; other failures are."""
    jobset = RUNTIME["spec"]["template"]["spec"]
    job = jobset["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    seconds = {each["name"]: each["value"] for each in container["env"]}["PET_SHUTDOWN_TIMEOUT"]
    assert pod["terminationGracePeriodSeconds"] > int(seconds)
    assert pod["restartPolicy"] == "Never"  # a pod that ends fails the job; JobSet makes all anew
    assert job["backoffLimit"] == 0
    (evicted,) = job["podFailurePolicy"]["rules"]
    assert (evicted["action"], evicted["onPodConditions"][0]["type"]) == (
        "FailJob",
        "DisruptionTarget",
    )
    (rule,) = jobset["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert jobset["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.slow
def test_kubernetes_trains_on_two_machines(short: Path, tmp_path: Path) -> None:
    """The job's command, with the variables that Trainer sets for torchrun."""
    trainer = TRAINJOB["spec"]["trainer"]
    # The image's `python` is of the environment with dist_adv, its torchrun of the one around it.
    assert trainer["command"] == ["python", "-m", "torch.distributed.run"]
    torchrun = [sys.executable, *trainer["command"][1:]]
    (config,) = (word for word in trainer["args"] if word.endswith(".yaml"))
    assert (ROOT / config).is_file()
    words = [str(short) if word == config else word for word in trainer["args"]]
    command = [*torchrun, *words, "--run-dir", str(tmp_path / "run")]
    env = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
    env |= {"PET_MASTER_PORT": str(free_port())}
    ranks = [env | {"PET_NODE_RANK": rank} for rank in "01"]
    train_on_two_machines([(command, each) for each in ranks], tmp_path / "run")


@pytest.mark.slow
def test_skypilot_trains_on_two_machines(short: Path, tmp_path: Path) -> None:
    """`run`, by bash, with SkyPilot's variables. The Python of the environment, which `setup` would
    make, is a stand-in that says what it was asked to run; then that is run."""
    python = tmp_path / "dist-adv" / "bin" / "python"
    assert f"~/{python.relative_to(tmp_path)}" in TASK["setup"]
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    env = {"HOME": str(tmp_path), "MASTER_PORT": str(free_port())}
    env |= {"CONFIG": str(short), "RUN_DIR": str(tmp_path / "run")}
    assert env.keys() > TASK["envs"].keys()
    env |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    env |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    commands = []
    for rank in "01":
        done = subprocess.run(
            ["bash", "-c", TASK["run"]],
            cwd=ROOT,  # `workdir`, as it is on each machine
            env=os.environ | env | {"SKYPILOT_NODE_RANK": rank},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        commands.append(([sys.executable, *done.stdout.splitlines()], {}))
    assert (ROOT / TASK["envs"]["CONFIG"]).is_file()
    train_on_two_machines(commands, tmp_path / "run")


@pytest.mark.parametrize("part", ["setup", "run"])
def test_skypilot_shellcheck(part: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    command = [str(shellcheck if shellcheck.exists() else "shellcheck"), "--shell=bash", "-"]
    done = subprocess.run(command, input=TASK[part], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
