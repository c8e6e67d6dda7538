"""Whoever watches a run may leave: a pipe's reader, a terminal. Its folder stays true."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import forked
from launch import SMALL, checkpoints, free_port, status, write_config
from limits import own_terminal

pytestmark = pytest.mark.slow

DIST_ADV = [sys.executable, "-m", "dist_adv"]
DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"
EPOCHS = 12


@pytest.fixture(scope="module")
def config(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c")
    return write_config(
        folder / "c.yaml", "fast-random", images, train={"epochs": EPOCHS}, model=SMALL
    )


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"} | more


def train(config: Path, run_dir: Path) -> list[str]:
    return [*DIST_ADV, "train", str(config), "--run-dir", str(run_dir)]


def test_a_reader_that_leaves(config: Path, tmp_path: Path) -> None:
    """`2>&1 | head -1`, where letters are ASCII and lines are short."""
    process = subprocess.Popen(
        train(config, tmp_path / "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(PYTHONIOENCODING="ascii", COLUMNS="20"),
    )
    assert process.stdout
    assert b"loading PyTorch" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert status(tmp_path / "run")["state"] == "done"
    assert f"epoch {EPOCHS}/{EPOCHS}" in (tmp_path / "run" / "log.txt").read_text()


def nowhere_to_write(folder: Path, line: str) -> int:
    shell = ["bash", "-c", line.replace("dist-adv", " ".join(DIST_ADV))]
    return subprocess.run(shell, cwd=folder, env=environment(), timeout=120).returncode


def test_a_full_disk_and_a_closed_one(config: Path, tmp_path: Path) -> None:
    line = f"dist-adv train {config} train.epochs=1 --run-dir run"
    assert nowhere_to_write(tmp_path, f"{line} > /dev/full 2>&- <&-") == 0
    assert status(tmp_path / "run")["state"] == "done"


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both sides of one, which are closed in the end at the latest."""
    sides = pty.openpty()
    yield sides
    for side in sides:
        with suppress(OSError):
            os.close(side)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_closes(
    nohup: bool, config: Path, terminal: tuple[int, int], tmp_path: Path
) -> None:
    """Its SIGHUP asks for a stop, and under nohup for nothing: then only what is shown is lost."""
    outside, inside = terminal
    run_dir = tmp_path / "run"
    process = forked.Popen(
        [*train(config, run_dir), "train.epochs=400"],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=environment(TERM="xterm"),
        start_new_session=True,
        preexec_fn=partial(own_terminal, signal.SIG_IGN if nohup else signal.SIG_DFL),
    )
    os.close(inside)
    os.set_blocking(outside, False)
    end = time.monotonic() + 120
    while not (run_dir / "checkpoints").exists() or not checkpoints(run_dir):
        assert time.monotonic() < end
        assert process.poll() is None
        with suppress(BlockingIOError):
            os.read(outside, 1 << 16)
        time.sleep(0.01)
    os.close(outside)
    if nohup:
        (last,) = checkpoints(run_dir)[-1:]
        while checkpoints(run_dir)[-1] == last:  # it goes on
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        (run_dir / "STOP").touch()
    assert process.wait(60) == (143 if nohup else 129)
    found = status(run_dir)
    assert (found["state"], found["reason"]) == ("preempted", "stop file" if nohup else "SIGHUP")
    assert checkpoints(run_dir)[-1] == f"step-{found['step']:09d}"


def test_a_rank_that_waits_for_others_can_be_stopped(config: Path, tmp_path: Path) -> None:
    """In torch's C++, where no handler runs: train catches signals, plan does not."""
    commands = {
        signal.SIGTERM: train(config, tmp_path / "run"),
        signal.SIGINT: [*DIST_ADV, "plan", str(DIGITS), "--gpus", "2"],
    }
    processes = {}
    for number, command in commands.items():
        port = free_port()
        ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes[number] = (
            port,
            forked.Popen(
                command,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(**ranks, **where),
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
            ),
        )
    for number, (port, process) in processes.items():
        end = time.monotonic() + 120
        while not listening(port):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 128 + number, said
        assert said.splitlines()[-1].startswith(f"dist-adv: stopped ({number.name}) before the")
    assert not (tmp_path / "run").exists()


def listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
