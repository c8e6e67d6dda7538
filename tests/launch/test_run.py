"""`launch/run.sh`: what it starts, what it refuses, and how signals reach the ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch import SMALL, Job, checkpoints, free_port, status, weights_hash, write_config

RUN = str(Path(__file__).parents[2] / "launch" / "run.sh")
EPOCHS, EPOCH = 12, 12  # and optimiser steps of one
PLAIN = "-m dist_adv"
TORCHRUN = "-m torch.distributed.run"
ALONE = f"{TORCHRUN} --standalone --local-addr localhost"
CORES = len(os.sched_getaffinity(0))

# Stand-ins for an interpreter that sees $GPUS GPUs, and for the driver's program.
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo "$GPUS"; exit; fi
echo "$OMP_NUM_THREADS" "$@"
"""
NVIDIA_SMI = "#!/bin/sh\n"
# Whether SIGHUP is ignored is inherited; these tests may run under nohup themselves.
HANGUP, NOHUP = ("env", "--default-signal=HUP"), ("nohup",)
OURS = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def run(
    *arguments: str,
    path: Path | None = None,
    wrapper: tuple[str, ...] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """run.sh with these variables of its own and no others."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    if path:
        kept["PATH"] = os.pathsep.join([str(path), kept["PATH"]])
    return subprocess.run(
        [*wrapper, RUN, *arguments],
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    for name, text in (("python-stand-in", PYTHON), ("nvidia-smi", NVIDIA_SMI)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "gpus", "variables", "threads", "started"),
    [
        ("train", 0, {}, CORES, PLAIN),
        ("train", 1, {}, CORES, PLAIN),
        ("train", 4, {}, max(1, CORES // 4), f"{ALONE} --nproc-per-node 4 {PLAIN}"),
        ("eval", 4, {}, max(1, CORES // 4), f"{ALONE} --nproc-per-node 4 {PLAIN}"),
        ("report", 4, {}, CORES, PLAIN),
        ("train", 4, {"NPROC": "1"}, CORES, PLAIN),
        ("train", 0, {"NPROC": "2", "OMP_NUM_THREADS": "3"}, 3, f"{ALONE} "
         f"--nproc-per-node 2 {PLAIN}"),
        ("sweep", 2, {}, CORES, PLAIN),
        ("sweep --only fast", 2, {}, max(1, CORES // 2), f"{ALONE} "
         f"--nproc-per-node 2 {PLAIN}"),
        (
            "train",
            8,
            # An address that no name belongs to.
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.9.8.7", "MASTER_PORT": "29400"},
            max(1, CORES // 8),
            f"{TORCHRUN} --nnodes 2 --node-rank 1 --master-addr 10.9.8.7 --master-port 29400 "
            f"--nproc-per-node 8 {PLAIN}",
        ),
    ],
)  # fmt: skip
def test_what_is_started(
    stand_ins: Path,
    command: str,
    gpus: int,
    variables: Mapping[str, str],
    threads: int,
    started: str,
) -> None:
    python = {"PYTHON": "python-stand-in", "GPUS": str(gpus)}
    done = run(*command.split(), "a b", "k=v", path=stand_ins, **python, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{threads} {started} {command} a b k=v\n"


TWO = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NPROC": "two"}, "NPROC: 'two' is no number of processes"),
        ({"NPROC": "0"}, "NPROC: '0' is no number of processes"),
        ({"NNODES": "-1"}, "NNODES: '-1' is no number of machines"),
        ({"NNODES": "2"}, "NODE_RANK: '' is no number of a machine; write 0 to 1"),
        ({**TWO, "NODE_RANK": "2"}, "NODE_RANK: '2' is no number of a machine; write 0 to 1"),
        ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR: not set; write the name of machine 0"),
        ({**TWO, "MASTER_ADDR": "no.invalid"}, "MASTER_ADDR: 'no.invalid' is not known"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT: 'http' is no number of a port"),
        ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT: 65536 is no port; write one below 32768"),
        ({"PYTHON": "/absent/python"}, "/absent/python: no such interpreter"),
    ],
)
def test_refused(variables: Mapping[str, str], says: str) -> None:
    refused(run("train", "x.yaml", **{"PYTHON": sys.executable, **variables}), says)


def refused(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"run.sh: {says}")
    assert done.stderr.count("\n") == 1


def test_only_training_and_evaluating_are_for_several_machines() -> None:
    refused(run("report", "x", PYTHON=sys.executable, **TWO), "NNODES: 'report' is no work")


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("train", "x.yaml", PYTHON=sys.executable, **TWO, MASTER_PORT=port)
    refused(done, f"MASTER_PORT: {port} is in use on localhost; set another one")


def test_torchrun_waits_for_a_checkpoint_and_survives_usr1(stand_ins: Path) -> None:
    """It is told so by variables, of which a user's own value stays."""
    variables = ("PET_SHUTDOWN_TIMEOUT", "PET_SIGNALS_TO_HANDLE")
    program = "#!/bin/sh\necho " + " ".join(f"${name}" for name in variables)
    (stand_ins / "python-stand-in").write_text(program)
    own = run("train", "x", path=stand_ins, wrapper=HANGUP, PYTHON="python-stand-in", NPROC="2")
    assert own.stdout == "300 SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1\n"
    nohup = run("train", "x", path=stand_ins, wrapper=NOHUP, PYTHON="python-stand-in", NPROC="2")
    assert nohup.stdout == "300 SIGTERM,SIGINT,SIGQUIT,SIGUSR1\n"
    users = {"NPROC": "2", "PET_SHUTDOWN_TIMEOUT": "20"}
    assert run("train", "x", path=stand_ins, PYTHON="python-stand-in", **users).stdout.startswith(
        "20 "
    )


def test_help() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in (*OURS, "PYTHON", "PET_SHUTDOWN_TIMEOUT"))
    assert "launch/run.sh train configs/digits/fast.yaml" in done.stdout
    nothing = run()
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.startswith("Usage: launch/run.sh")


def start(
    config: Path,
    run_dir: Path,
    ranks: int = 1,
    wrapper: tuple[str, ...] = HANGUP,
    **variables: str,
) -> Job:
    env = {"PYTHON": sys.executable, **variables}
    return Job(config, run_dir, ranks, env=env, wrapper=wrapper, launcher=(RUN,))


def stop(job: Job, number: signal.Signals) -> int:
    """The exit status after a signal to run.sh, once an epoch is done."""
    assert job.wait_for_checkpoint(EPOCH)
    os.kill(job.process.pid, number)
    exit_status = job.wait(60)
    found = status(job.run_dir)
    assert (found["state"], found["reason"]) == ("preempted", number.name), job.output()
    assert EPOCH <= found["step"] < EPOCHS * EPOCH
    assert checkpoints(job.run_dir)[-1] == f"step-{found['step']:09d}"
    return exit_status


def finish_all(jobs: list[Job]) -> None:
    try:
        for job in jobs:
            job.finish()
    finally:
        for job in jobs:
            job.kill()


@pytest.mark.slow
def test_one_process_two_processes_two_machines(images: Path, tmp_path: Path) -> None:
    """Stopped on one, stopped on two, and ended on two 'machines', which are both this one.

    The last part ends as two processes end that nothing has stopped, bit for bit.
    """
    config = write_config(
        tmp_path / "run.yaml", "free", images, train={"epochs": EPOCHS}, model=SMALL
    )
    assert stop(start(config, tmp_path / "alone"), signal.SIGUSR1) == 143  # dist-adv's own
    assert stop(start(config, tmp_path / "run", 2, NPROC="2"), signal.SIGHUP) == 1  # torchrun's
    port = str(free_port())
    machines = [{"NPROC": "1", **TWO, "NODE_RANK": rank, "MASTER_PORT": port} for rank in "01"]
    finish_all([start(config, tmp_path / "run", **machine) for machine in machines])
    assert status(tmp_path / "run")["state"] == "done"
    assert json.loads((tmp_path / "run" / "env.json").read_text())["world_size"] == 2

    Job(config, tmp_path / "whole", ranks=2).finish()
    assert weights_hash(tmp_path / "run") == weights_hash(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_under_nohup_outlive_the_terminal(images: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.yaml", "free", images, train={"epochs": EPOCHS}, model=SMALL
    )
    job = start(config, tmp_path / "run", 2, NOHUP, NPROC="2")
    assert job.wait_for_checkpoint(EPOCH)
    os.kill(job.process.pid, signal.SIGHUP)
    job.finish()
    assert status(tmp_path / "run")["state"] == "done"
