"""A process that makes no progress says where it hangs and ends; one that does is left alone."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PRELUDE = """
import threading, time
from dist_adv.distributed import watchdog
watchdog._SECONDS_TO_SPEAK = 0.2
dog = watchdog.Watchdog({limit} / 60, rank=1, ranks=3)
"""


def run(script: str, limit: float = 0.5) -> subprocess.CompletedProcess[str]:
    """Must end; many scripts do not by themselves."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE.format(limit=limit) + script],
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_hanging_process_speaks_and_ends():
    """Which rank, which limit, every thread's stack; status 1 from wherever it hangs."""
    script = """
def deep_in_the_work():
    time.sleep(3600)

threading.Thread(target=deep_in_the_work, daemon=True).start()
dog.beat()
try:
    time.sleep(3600)
finally:
    print("reached")
"""
    done = run(script)
    assert done.returncode == 1
    assert done.stdout == ""
    said = done.stderr.splitlines()
    assert said[0] == (
        "dist-adv: rank 1 of 3 has made no progress for 0.5 s (train.timeout_minutes); "
        "where its threads are:"
    )
    assert done.stderr.count("hread 0x") == 3  # the main thread, the worker, the watchdog
    assert "in deep_in_the_work" in done.stderr


def test_process_whose_partner_is_gone_ends():
    script = """
import os, subprocess, sys
watchdog._SECONDS_TO_NOTICE = 0.5
partner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
watchdog.Watchdog(1 / 60, rank=1, ranks=3, others={0: os.getppid(), 2: partner.pid})
print(partner.wait(), flush=True)
time.sleep(3600)
"""
    done = run(script)
    assert done.returncode == 1
    assert done.stdout == "0\n"
    assert done.stderr.startswith("dist-adv: rank 1 of 3 lost another rank (2 is gone)")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("for _ in range(30):\n    dog.beat(); time.sleep(0.05)", "it makes progress"),
        ("time.sleep(1)", "it has not begun"),
        ("dog.beat(); dog.pause(); time.sleep(1)", "waiting is no fault"),
        ("dog.beat(); dog.close(); time.sleep(1)", "it is over"),
    ],
)
def test_left_alone(script, why):
    """For longer than the limit."""
    done = run(f"{script}\nprint('reached')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "reached\n", ""), why


def test_counts_again_after_a_pause():
    done = run("dog.pause(); time.sleep(0.7); dog.beat(); time.sleep(3600)")
    assert done.returncode == 1
    assert "no progress for 0.5 s" in done.stderr


def test_time_in_which_it_was_stopped_does_not_count():
    """Ctrl-Z, a debugger, `scontrol suspend`: it could not have made progress."""
    script = """
import os, signal, subprocess, sys
dog.beat()
wake = f"sleep 2; kill -CONT {os.getpid()}"
subprocess.Popen(["sh", "-c", wake])
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(0.2)
dog.beat()
print("reached", flush=True)
time.sleep(3600)
"""
    done = run(script)
    assert done.stdout == "reached\n"
    assert "no progress for 0.5 s" in done.stderr  # and it watches on


def test_it_ends_although_nobody_reads_what_it_says():
    script = "import os; os.close(2); dog.beat(); time.sleep(3600); print('reached')"
    done = run(script)
    assert (done.returncode, done.stdout) == (1, "")


def test_watching_keeps_no_process_alive():
    """One that ends by itself ends at once, with its own status."""
    done = run("dog.beat(); raise SystemExit(7)", limit=3600)
    assert done.returncode == 7
