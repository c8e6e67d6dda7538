"""`launch/accelerate/`: run for real where no GPU is needed; the rest as accelerate reads it.

Files of DeepSpeed and FSDP2 are tested with their engines.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run as torchrun
from accelerate.commands.launch import (
    _filter_args,
    _validate_launch_command,
    launch_command_parser,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from dist_adv.distributed import engines
from launch import Job, free_port, status

FILES = Path(__file__).parents[2] / "launch" / "accelerate"
TRAIN = ("-m", "dist_adv", "train", "configs/digits/fast.yaml")
DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"
TINY = (
    *("model.width=4", "train.max_steps=2", "train.batch_size=512"),
    *("eval.attacks=[natural]", "eval.every=0", "track.wandb.mode=disabled"),
)


def launcher(name: str, *options: str) -> tuple[str, ...]:
    program = (sys.executable, "-m", "accelerate.commands.launch")
    return (*program, "--config_file", str(FILES / name), *options, "-m", "dist_adv")


def hardware(run_dir: Path) -> tuple[int, str]:
    found = json.loads((run_dir / "env.json").read_text())
    return found["world_size"], found["hardware"]["device"]


@pytest.mark.slow
def test_cpu_trains_on_two_ranks_and_one(tmp_path: Path) -> None:
    """`cpu.yaml`, and `one-gpu.yaml`, which takes the CPU where there is no GPU."""
    for name, ranks in (("cpu.yaml", 2), ("one-gpu.yaml", 1)):
        run_dir = tmp_path / name
        Job(DIGITS, run_dir, ranks, TINY, launcher=launcher(name)).finish()
        assert status(run_dir)["state"] == "done"
        gpu = torch.cuda.is_available() and name != "cpu.yaml"
        assert hardware(run_dir) == (ranks, "cuda" if gpu else "cpu")


@pytest.mark.slow
def test_two_machines_train_together(tmp_path: Path) -> None:
    """`multi-node.yaml` started twice on this machine, without GPUs."""
    where = ("--num_processes", "2", "--main_process_ip", "127.0.0.1")
    port = ("--main_process_port", str(free_port()))
    jobs = [
        Job(
            DIGITS,
            tmp_path / "run",
            arguments=TINY,
            env={"CUDA_VISIBLE_DEVICES": ""},
            launcher=launcher("multi-node.yaml", *where, *port, "--machine_rank", str(machine)),
        )
        for machine in (0, 1)
    ]
    try:
        for job in jobs:
            job.finish()
    finally:
        for job in jobs:
            job.kill()
    assert hardware(tmp_path / "run") == (2, "cpu")


def validated(name: str, *options: str) -> Any:
    """What `accelerate launch` makes of a file and options, through its own validation."""
    command = ["--config_file", str(FILES / name), *options, *TRAIN]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    return arguments


def torchruns(arguments: Any) -> tuple[Any, dict[str, str]]:
    """torchrun's configuration and the ranks' environment that accelerate derives from it."""
    environment = prepare_multi_gpu_env(arguments)
    known = _filter_args(arguments, torchrun.get_args_parser(), ["script.py"])
    return torchrun.config_from_args(known)[0], environment


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins: torch counts four GPUs, where there may be none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_multi_gpu_takes_every_gpu_of_the_machine(
    four_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`multi-gpu.yaml` names no number: torchrun counts."""
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "300")
    arguments = validated("multi-gpu.yaml")
    assert arguments.multi_gpu
    assert not arguments.use_cpu
    found, environment = torchruns(arguments)
    assert (found.max_nodes, found.nproc_per_node, found.shutdown_timeout) == (1, 4, 300)
    assert found.rdzv_endpoint.split(":")[1] not in ("0", "29500")  # a free one
    assert environment.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    fewer, _ = torchruns(validated("multi-gpu.yaml", "--num_processes", "2"))
    assert fewer.nproc_per_node == 2


def test_multi_gpu_says_so_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="Cuda is not available"):
        torchruns(validated("multi-gpu.yaml"))


def test_multi_node_shares_the_processes_between_the_machines() -> None:
    options = ("--num_machines", "2", "--num_processes", "16", "--main_process_ip", "node-0")
    found, environment = torchruns(validated("multi-node.yaml", *options, "--machine_rank", "1"))
    assert (found.min_nodes, found.max_nodes, found.nproc_per_node) == (2, 2, 8)
    assert (found.rdzv_backend, found.rdzv_endpoint) == ("static", "node-0:29500")
    assert found.rdzv_configs["rank"] == 1
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # `train.precision` decides


def test_multi_node_insists_on_the_number_of_processes() -> None:
    with pytest.raises(ValueError, match="--num_processes"):
        validated("multi-node.yaml", "--main_process_ip", "node-0")


def test_one_gpu_is_one_plain_process() -> None:
    arguments = validated("one-gpu.yaml")
    ways = (arguments.multi_gpu, arguments.use_deepspeed, arguments.use_fsdp)
    assert not any(ways)
    command, environment = prepare_simple_launcher_cmd_env(arguments)
    assert command == [sys.executable, *TRAIN]
    assert environment["ACCELERATE_USE_CPU"] == "False"


@pytest.mark.slow
def test_cpu_hides_gpus() -> None:
    arguments = validated("cpu.yaml")
    assert (arguments.num_processes, arguments.multi_gpu) == (2, True)
    _, environment = torchruns(arguments)
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]


@pytest.mark.parametrize(
    ("name", "prepare"),
    [
        ("one-gpu.yaml", prepare_simple_launcher_cmd_env),
        ("cpu.yaml", prepare_multi_gpu_env),
        ("fsdp2.yaml", prepare_multi_gpu_env),
        ("deepspeed-zero2.yaml", prepare_deepspeed_cmd_env),
    ],
)
def test_what_accelerate_sets_by_itself_is_accepted(
    name: str, prepare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables that would change training are refused; these values of them would not."""
    arguments = validated(name)
    arguments.deepspeed_fields_from_accelerate_config = ""  # as `accelerate launch` fills it in
    prepared = prepare(arguments)
    environment = prepared if isinstance(prepared, dict) else prepared[-1]
    ours = {key: value for key, value in environment.items() if key in engines._VARIABLES}
    assert ours
    for key, value in ours.items():
        monkeypatch.setenv(key, value)
    engines.check_environment()
