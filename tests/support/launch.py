"""Training as real processes, alone or under torchrun, to be signalled, killed and run again.

They are forked from one that has imported torch (see `forked.py`), torchrun and its ranks as well.
"""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import yaml

import forked
from cases import config

SUPPORT = Path(__file__).parent
# Of a configuration on digits: a single step of a small network.
TINY = (
    *("model.width=4", "train.max_steps=1", "train.batch_size=512", "method.guard=none"),
    *("eval.attacks=[natural]", "eval.every=0", "track.wandb.mode=disabled"),
)
# Of images of noise: a fifth of the layers of the network of `cases.py`, for what takes many steps.
SMALL = {"name": "wide_resnet", "depth": 8, "widen": 1, "width": 4}


def write_config(
    path: Path, case: str, images: Path, norm: str = "batch", **sections: dict
) -> Path:
    """The configuration of a case of `cases.py`, with keys of sections replaced, as a file."""
    tree = config(case, norm, images)
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    path.write_text(yaml.safe_dump(tree))
    return path


class Job:
    """One `dist-adv train`. Its output is in `output()`, whatever becomes of it.

    module: what runs instead of dist_adv, for faults that only a changed program has. wrapper: a
    command that runs the whole of it, such as `prlimit`. launcher: what comes before `train`,
    where that is another program. prepare: called in the process before the command begins.
    """

    def __init__(
        self,
        config: Path,
        run_dir: Path,
        ranks: int = 1,
        arguments: tuple[str, ...] = (),
        module: str = "dist_adv",
        env: Mapping[str, str] | None = None,
        wrapper: tuple[str, ...] = (),
        launcher: tuple[str, ...] = (),
        prepare: Callable[[], object] | None = None,
    ) -> None:
        command = [*wrapper, *(launcher or own_launcher(ranks, module))]
        command += ["train", str(config), "--run-dir", str(run_dir)]
        path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
        settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
        self.run_dir, self.count = run_dir, ranks
        self.log = run_dir.with_name(f"{run_dir.name}-{time.monotonic_ns()}.log")
        with self.log.open("w") as log:
            self.process = forked.Popen(
                [*command, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | settings,
                start_new_session=True,  # a group of its own, to be killed as a whole
                preexec_fn=prepare,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that run now."""
        if self.count == 1:
            return {0: self.process.pid} if self.process.poll() is None else {}
        found = {}
        for pid in _children(self.process.pid):
            rank = _rank(pid)
            if rank is not None:
                found[int(rank)] = pid
        return found

    def wait_until(self, seen: Callable[[], object], timeout: float = 120) -> bool:
        """True as soon as `seen()` is, False if the job ends before."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if seen():
                return True
            if self.process.poll() is not None:
                return bool(seen())
            time.sleep(0.002)
        self.kill()
        raise AssertionError(f"not seen in {timeout:g} s:\n{self.output()[-3000:]}")

    def wait_for_checkpoint(self, step: int) -> bool:
        return self.wait_until((self.run_dir / "checkpoints" / f"step-{step:09d}").exists)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """To the given ranks, or to all of them."""
        pids = self.ranks()
        for rank in ranks or pids:
            os.kill(pids[rank], number)

    def kill(self) -> None:
        """Everything, at once: as a machine that loses its power.

        torchrun's ranks are in sessions of their own: one signal to a group does not reach them.
        """
        for pid in family(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, timeout: float = 180) -> int:
        """The exit status; the whole job is killed where it takes too long."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still there after {timeout:g} s:\n{self.output()}") from None

    def finish(self, timeout: float = 180) -> None:
        """Must end well."""
        status = self.wait(timeout)
        assert status == 0, f"exit status {status}:\n{self.output()[-4000:]}"


def own_launcher(ranks: int, module: str) -> list[str]:
    """Python, or torchrun where there are several ranks."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(several if ranks > 1 else []), "-m", module]


def free_port() -> int:
    """One below those that the kernel gives to connections, so that none takes it meanwhile."""
    while True:
        port = random.randrange(20000, 32768)
        with suppress(OSError), socket.create_server(("", port)):
            return port


def weights_hash(run_dir: Path) -> str:
    """SHA-256 of the final weights."""
    return hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def family(pid: int) -> dict[int, str]:
    """A process and all that it and its children have started, with their commands.

    W&B's helper is one of them, though in a session of its own.
    """
    members = {}
    waiting = [pid]
    for member in waiting:
        with suppress(FileNotFoundError, ProcessLookupError):
            members[member] = Path(f"/proc/{member}/cmdline").read_text()
            for children in Path(f"/proc/{member}/task").glob("*/children"):
                waiting += map(int, children.read_text().split())
    return members


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except FileNotFoundError:
        return []


def _rank(pid: int) -> str | None:
    """Of a process that torchrun has started; a forked one says it where its name is."""
    with suppress(FileNotFoundError, ProcessLookupError):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if name.startswith("rank-"):
            return name.removeprefix("rank-")
    return _environment(pid).get("RANK")


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return {}
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def train_under(
    out: Path, images: Path, runs: list[dict], engine: str = "", ranks: int = 2
) -> Path:
    """What `engine_runs.py` makes of a list of runs, on the CPU; returns `out`.

    engine: one of the files of `launch/accelerate/` of that kind; DDP without.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    if engine:
        file = SUPPORT.parents[1] / "launch" / "accelerate" / engine
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
        launcher += ["--num_processes", str(ranks)]
    if engine == "fsdp2.yaml":
        launcher += ["--fsdp_min_num_params", "5000"]  # or all of such a small network is one piece
    script = [str(SUPPORT / "engine_runs.py"), str(out), str(images), json.dumps(runs)]
    done = forked.run(
        [sys.executable, *launcher, *script],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out
