"""A Slurm cluster of two nodes on this machine: its commands, and what becomes of its jobs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import dist_adv
import forked

ROOT = Path(dist_adv.__file__).parents[1]
SCRIPTS, DIGITS = ROOT / "launch" / "slurm", ROOT / "configs" / "digits"
START = ROOT / "tests" / "slurm" / "cluster.sh"
SITE = f"""\
ACCOUNT=
PARTITION=
TIME=10:00
GPUS_PER_NODE=0
RANKS_PER_NODE=2
CPUS_PER_RANK=1
OPTIONS=()
environment() {{ PATH={Path(sys.executable).parent}:$PATH; }}
"""
# A stand-in for Apptainer, without an image: it says what it was asked, and as Apptainer does
# outside of a terminal it stays and hands signals on to the command, which Slurm signals as well.
APPTAINER = """\
#!/bin/bash
echo "$@" >>apptainer.log
while [ "$1" != image.sif ]; do shift; done
shift
"$@" &
for name in TERM USR1 HUP; do trap "kill -s $name $!" "$name"; done
while kill -0 $! 2>/dev/null; do wait $!; done
wait $!
"""


class Cluster:
    """home: the folder of its daemons. port: the first of three."""

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.port = home, port
        self.environment = os.environ | {"SLURM_CONF": str(home / "slurm.conf")}

    def control(self, what: str, *arguments: str) -> None:
        """cluster.sh. Skips the tests where this machine cannot have a cluster."""
        done = subprocess.run([START, what, self.home, *arguments], capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *command: str | Path, at: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """A command typed in the folder `at`, where the site's file is."""
        site = at / "site.sh"
        if not site.exists():
            site.write_text(SITE)
        return forked.run(
            list(map(str, command)),
            cwd=at,
            env=self.environment | {"DIST_ADV_SITE": str(site)} | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def submit(self, *arguments: str, at: Path, **env: str) -> str:
        """The number of a job made by submit.sh; a batch script is named without its folder."""
        words = [SCRIPTS / word if word.endswith(".sbatch") else word for word in arguments]
        done = self.run(SCRIPTS / "submit.sh", *words, at=at, **env)
        assert done.returncode == 0, done.stderr
        return re.fullmatch(r"Submitted batch job (\d+)\n", done.stdout)[1]

    def ask(self, *command: str) -> str:
        """What a command of Slurm's says."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str, key: str) -> str:
        """A field of `scontrol show job`."""
        return re.search(rf"\b{key}=(\S*)", self.ask("scontrol", "show", "job", number))[1]

    def wait_for(self, number: str, state: str, starts: int = 1) -> None:
        """Until the job is in this state after so many starts; fails where it ends in another."""

        def seen() -> bool:
            now = self.job(number, "JobState")
            if now == state and int(self.job(number, "Restarts")) >= starts - 1:
                return True
            assert now in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), now
            return False

        try:
            poll(seen, f"job {number} {state} at start {starts}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(number)[-5000:]}") from None

    def log(self, number: str) -> str:
        path = Path(self.job(number, "StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""

    def told(self, number: str) -> str:
        """What the daemons have written down of a job, an array's tasks included."""
        lines = [
            line
            for daemon in sorted((self.home / "log").glob("slurm*"))
            for line in daemon.read_text(errors="replace").splitlines()
            if number in line
        ]
        return "\n".join(lines[-100:])

    def lose(self, node: str) -> None:
        """The node's daemon and all of its jobs' processes die at once."""
        daemon = int((self.home / f"slurmd.{node}.pid").read_text())
        tasks = [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._at(pid, node)
        ]
        steps = {_parent(pid) for pid in tasks} - set(tasks)
        for pid in [daemon, *steps, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _at(self, pid: int, node: str) -> bool:
        """Does the process belong to a job's part on this node?"""
        with suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            mine = f"SLURM_CONF={self.home}/slurm.conf", f"SLURMD_NODENAME={node}"
            return all(each.encode() in variables for each in mine)
        return False


def reaches(run_dir: Path, step: int) -> None:
    """Until there is a checkpoint of this step or of a later one."""
    folder = run_dir / "checkpoints"

    def seen() -> bool:
        return any(int(path.name.removeprefix("step-")) >= step for path in folder.glob("step-*"))

    poll(seen, f"{run_dir.name} at step {step}")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def poll(seen: Callable[[], object], what: str, timeout: float = 120) -> None:
    """Until `seen()` is true."""
    end = time.monotonic() + timeout
    while not seen():
        assert time.monotonic() < end, f"not seen in {timeout:g} s: {what}"
        time.sleep(0.1)
