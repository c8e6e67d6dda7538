"""The table of runs: each state, read off folders as training leaves them."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from dist_adv import cli
from dist_adv.runs import status
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.lock import Lock, held
from dist_adv.sweeps.sweep import claim, load_sweep
from made_up_runs import epoch, evaluation, write_lines

DIGITS = Path(__file__).parents[2] / "configs" / "digits"
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def write(folder: Path, state: str, **about: Any) -> Path:
    """A run of 200 steps that is in the middle of its fifth epoch of 1,000 images."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "method": {"name": "fast"},
        "threat": {"norm": "linf", "eps": 8 / 255},
        "model": {"name": "preact_resnet18"},
        "data": {"name": "digits"},
        "train": {"epochs": 20, "batch_size": 100, "precision": "auto", "seed": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    env = {"total_steps": 200, "dataset": {"train": 1000}}
    (folder / "env.json").write_text(json.dumps(env))
    curve = epoch(4, 40.0, images_per_s=100.0, pgd_accuracy=0.25)
    train = {"kind": "train", "step": 50, "epoch": 5.0, "seconds": 42.0, "images_per_s": 500.0}
    lines = [json.dumps(record) for record in (curve, train)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')  # just being written
    RunFolder(folder).mark(state, **about)  # type: ignore[arg-type]
    return folder


def only(folder: Path) -> status.Status:
    (found,) = status.gather([folder])
    return found


def test_a_running_one_has_progress_rate_and_time_left(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "running")
    lock = Lock(run)
    found = only(run)
    assert (found.state, found.step, found.total, found.epochs) == ("running", 50, 200, 5.0)
    assert found.images_per_s == 500.0
    assert found.left == pytest.approx(15 * 1000 / 500)  # 15 more epochs
    assert found.robust == ("pgd-10", 0.25)
    lock.release()
    assert only(run).state == "killed"  # says that it runs, and nobody is there


def test_others_say_why(tmp_path: Path) -> None:
    preempted = only(write(tmp_path / "a", "preempted", reason="SIGTERM"))
    failed = only(write(tmp_path / "b", "failed", reason="the loss was not finite"))
    assert (preempted.state, preempted.reason) == ("preempted", "SIGTERM")
    assert (failed.state, failed.reason) == ("failed", "the loss was not finite")


def test_a_finished_one_is_judged_by_its_strongest_attack(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "done")
    results = [("pgd-100", 0.2, 359, 100)]  # of the shorter run that this one was
    results += [("natural", 0.9, 359, 200), ("pgd-50", 0.5, 359, 200), ("pgd-10", 0.6, 359, 200)]
    results += [("pgd-50", 0.4, 359, 200), ("pgd-50", 0.1, 10, 200)]  # again; then a quick look
    lines = [evaluation(attack, share, n, step=step) for attack, share, n, step in results]
    write_lines(run / "results.jsonl", lines)
    assert (only(run).state, only(run).robust) == ("done", ("pgd-50", 144 / 359))


def test_looking_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    """A run that finds somebody looking waits for that instant."""
    run = write(tmp_path / "run", "running")
    with (run / ".lock").open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.02, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        Lock(run).release()
    assert held(run) is False


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Six runs, of which some have come to something."""
    path = tmp_path / "many.yaml"
    names = "done, killed, failed, early, next, last"
    runs = ", ".join(f"{{name: {name}}}" for name in names.split(", "))
    path.write_text(f"base: {DIGITS}/fast.yaml\nruns: [{runs}]")
    out = tmp_path / "out"
    claim(load_sweep(path), out)
    write(out / "done", "done")
    write(out / "killed", "running")
    write(out / "failed", "failed", reason="out of memory")
    (out / "logs").mkdir()
    complaint = "Traceback\ndist-adv: one\ndist-adv: data.root: is no folder\n"
    (out / "logs/early.txt").write_text(complaint)
    stopped = "dist-adv: stopped (SIGTERM); the same command goes on\n"
    (out / "logs/next.txt").write_text(stopped)  # before it had a folder
    return out


def states(out: Path) -> dict[str, str]:
    return {Path(run.name).name: run.state for run in status.gather([out])}


def test_a_sweep_is_all_of_its_runs(sweep: Path) -> None:
    assert list(states(sweep).items()) == [
        ("done", "done"),
        ("killed", "killed"),
        ("failed", "failed"),
        ("early", "failed"),  # before it had a folder
        ("next", "not started"),
        ("last", "not started"),
    ]
    assert status.gather([sweep])[3].reason == "data.root: is no folder"


def test_a_sweep_that_is_at_work_has_runs_that_wait(sweep: Path) -> None:
    lock = Lock(sweep)
    found = states(sweep)
    assert [found[name] for name in ("done", "killed", "failed")] == ["done", "queued", "failed"]
    assert [found[name] for name in ("next", "last")] == ["queued", "queued"]
    lock.release()


def test_slurm_is_asked(sweep: Path, tmp_path: Path) -> None:
    """A stand-in for squeue: job 7 is the sweep's array, 8 was submitted for one of its runs."""
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin/squeue"
    queue = ["7_0|PENDING|x", "7_1|RUNNING|None", "7_5|PENDING|Priority", "8|PENDING|Dependency"]
    squeue.write_text("#!/bin/sh\n" + "\n".join(f"echo '{line}'" for line in queue))
    squeue.chmod(0o755)
    (sweep / "slurm_job").write_text("7\n")
    (sweep / "next").mkdir()
    (sweep / "next/slurm_job").write_text("8\n")
    found = {Path(run.name).name: (run.state, run.reason) for run in status.gather([sweep])}
    assert found["done"] == ("done", "")
    assert found["killed"] == ("running", "")  # elsewhere, behind a lock that is not seen here
    assert found["failed"] == ("failed", "out of memory")
    assert found["next"] == ("queued", "Dependency")
    assert found["last"] == ("queued", "Priority")


def test_the_command_prints_a_line_each_into_a_pipe(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._run(["status", str(sweep)]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if line.startswith("  /")}
    assert "50 of 200" in rows[str(sweep / "killed")]
    assert "pgd-10 25.0%" in rows[str(sweep / "done")]
    assert f"{sweep / 'failed'}: out of memory" in said
    assert cli._run(["status", str(tmp_path)]) == 2
    assert "is no folder of a run or of a sweep" in capsys.readouterr().err


@pytest.mark.parametrize("width", [30, 120])
def test_a_table_that_is_too_wide_is_a_paragraph_each(width: int) -> None:
    robust, words = ("pgd-10", 0.25), ["50", "of", "200", "1.5", "pgd-10", "25.0%"]
    known = [
        status.Status("runs/free-8-seed0", "failed", "out of memory", 50, 200, 1.5, robust=robust)
    ]
    console = Console(width=width, file=io.StringIO())
    console.print(status.Overview(known))
    assert isinstance(console.file, io.StringIO)
    lines = [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]
    assert max(map(len, lines)) <= width
    if width == 30:
        assert lines[0] == "runs/free-8-seed0"
        assert " ".join(lines[1:]) == (
            "failed, 50 of 200 steps, 1.5 epochs, pgd-10 25.0%: out of memory"
        )
    else:
        assert lines[2].split() == ["runs/free-8-seed0", "failed", *words]
        assert lines[3] == "runs/free-8-seed0: out of memory"


def test_watching_shows_what_changes(tmp_path: Path) -> None:
    """On a terminal, until Ctrl-C, which is no failure."""
    run = write(tmp_path / "run", "running")
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "dist_adv", "status", "run", "--watch"]
    watch = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=inside,
        stderr=inside,
        env=os.environ | {"TERM": "xterm"},
        # A shell without job control has what it puts into the background ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    os.close(inside)
    seen = b""

    def wait_for(word: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while word not in seen:
            assert time.monotonic() < end, seen
            assert select.select([terminal], [], [], 60)[0], seen
            seen += os.read(terminal, 4096)

    try:
        wait_for(b"killed")
        RunFolder(run).mark("failed", reason="out of memory")
        wait_for(b"run: out of memory")
        watch.send_signal(signal.SIGINT)
        assert watch.wait(60) == 0, os.read(terminal, 4096)
    finally:
        watch.kill()
        os.close(terminal)


@pytest.mark.slow
def test_watching_in_a_pipe_ends_with_its_reader(tmp_path: Path) -> None:
    """Each change is a table of its own."""
    run = write(tmp_path / "run", "running")
    command = [sys.executable, "-m", "dist_adv", "status", "run", "--watch"]
    watch = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert watch.stdout
        for word in ("killed", "out of memory"):
            assert any(word in line for line in watch.stdout)
            RunFolder(run).mark("failed", reason="out of memory")
        watch.stdout.close()
        RunFolder(run).mark("done")
        assert watch.wait(60) == 0
    finally:
        watch.kill()
