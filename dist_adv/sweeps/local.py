"""The runs of a sweep: one of them here, or all of them as processes, and the report at the end."""

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.live import Live

from dist_adv import packages
from dist_adv.config import load_config
from dist_adv.distributed import launched
from dist_adv.distributed.start import threads_per_rank
from dist_adv.distributed.stopping import REASONS, STARTED_BY_SWEEP, Stopping
from dist_adv.errors import STOPPED, Preempted, RunFailure, UserError
from dist_adv.report import write_report
from dist_adv.runs import status
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.lock import Lock, held
from dist_adv.sweeps.sweep import REPORT, SAVED, Sweep, SweepRun, check, claim
from dist_adv.terminal import console, interactive, start_logging
from dist_adv.training.run import train_run

log = logging.getLogger("dist_adv")
_SECONDS_BETWEEN_LOOKS = 1.0


def run_one(sweep: Sweep, which: str, out: Path) -> None:
    """Train a run of the sweep in this process; every rank of a launcher calls this."""
    run = sweep.find(which)
    claim(sweep, out)
    if run.config.track.wandb.group is None:
        os.environ.setdefault("WANDB_RUN_GROUP", out.resolve().name)
    train_run(run.config, out / run.name, "auto")


def run_sweep(sweep: Sweep, out: Path, jobs: int) -> None:
    """Train every run that is not done, `jobs` of them side by side, and report on those done.

    Raises UserError before anything starts; Preempted where the sweep was asked to stop, after its
    runs have stopped; RunFailure naming the runs that are not done, after all others.
    """
    launched.check()
    if launched.ranks() > 1:
        raise UserError("a sweep starts processes itself: use no launcher, or --only RUN under it")
    packages.need("matplotlib", "the sweep's report", "matplotlib")
    start_logging(True)
    check(sweep, out)
    lock = Lock(out, "--out")
    try:
        claim(sweep, out)  # the runs still to start are of what it writes
        runs = _Runs(sweep, out, jobs)
        runs.run()
        done = [out / name for name, run in runs.known.items() if run.state == "done"]
        if done:
            print(f"report: {write_report(done, out / REPORT)}")
        rest = [run for run in runs.known.values() if run.state != "done"]
        if rest:
            why = "; ".join(f"{run.name} {run.state}: {run.reason}" for run in rest)
            raise RunFailure(f"{len(rest)} of {len(sweep.runs)} runs are not done ({why})")
    finally:
        lock.release()


@dataclass(frozen=True)
class _Job:
    """The process of a run. share: of the machine, what it was given; said: its output before."""

    run: SweepRun
    process: "subprocess.Popen[bytes]"
    share: dict[str, str]
    log: Path
    said: int

    def trouble(self) -> str:
        """Why it did not end well: its own last word, or else what ended it."""
        code = self.process.returncode
        how = f"exit status {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        return status.last_word(self.log, self.said) or f"{how}; see {self.log}"


class _Runs:
    """All runs of a sweep: waiting, running, and what is known of each."""

    def __init__(self, sweep: Sweep, out: Path, jobs: int) -> None:
        self.out = out
        self.running: list[_Job] = []
        self.waiting = [run for run in sweep.runs if not _is_done(run, out)]
        self.shares = _shares(min(jobs, max(1, len(self.waiting))))
        self.known = {run.name: status.read(out / run.name, run.name) for run in sweep.runs}
        for run in self.waiting:
            self._know(run.name, "queued")

    def run(self) -> None:
        """Run all of them. Raises Preempted when all have stopped that were asked to."""
        stopping, stop = Stopping(self.out, None, main=True), ""
        try:
            live = Live(console=console, auto_refresh=False, transient=True)
            with live if interactive() else nullcontext():
                while self.running or (self.waiting and not stop):
                    if not stop and (stop := REASONS[stopping.reason()]):
                        self._ask_to_stop()
                    if not stop:
                        self._start()
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
                    self._collect(stop)
                    live.update(self._overview(), refresh=live.is_started)
        finally:
            self._ask_to_stop()  # where this could not go on
            console.print(self._overview())
        if stop:
            stopping.heeded()
            raise Preempted(stop)

    def _start(self) -> None:
        """As many as there are shares; a run that another process is at comes later."""
        for run in list(self.waiting):
            if not self.shares:
                return
            if held(self.out / run.name):
                self._know(run.name, "queued", "in use by another process")
                continue
            self.waiting.remove(run)
            self.running.append(_start(run, self.out, self.shares.pop(0)))
            self._know(run.name, "running")
            log.info("%s: started", run.name)

    def _collect(self, stop: str) -> None:
        for job in list(self.running):
            name, code = job.run.name, job.process.poll()
            if code is None:
                self._know(name, "running")
                continue
            self.running.remove(job)
            self.shares.append(job.share)
            if code == 0:
                self._know(name, "done")
            elif stop or code in STOPPED:  # as `Preempted` ends: perhaps at train.max_minutes
                self.known[name] = status.read(self.out / name, name)
            else:
                self._know(name, "failed", job.trouble())
            log.info("%s: %s", name, self.known[name].state)

    def _ask_to_stop(self) -> None:
        """Ask each to save and exit."""
        for job in self.running:
            job.process.terminate()

    def _overview(self) -> status.Overview:
        return status.Overview(list(self.known.values()))

    def _know(self, name: str, state: str, reason: str = "") -> None:
        """Note what is known here; status.json may not say it yet, or no more."""
        found = status.read(self.out / name, name)
        self.known[name] = replace(found, state=state, reason=reason)


def _is_done(run: SweepRun, out: Path) -> bool:
    """Tell whether a run is done as it is wanted now; what is not clear is the run's to say."""
    folder = RunFolder(out / run.name)
    with suppress(UserError):
        return folder.state == "done" and load_config(folder.config) == run.config
    return False


def _start(run: SweepRun, out: Path, share: dict[str, str]) -> _Job:
    path = status.log_of(out, run.name)
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "dist_adv", "sweep", str(out / SAVED), "--out", str(out)]
    with path.open("ab") as file:
        said = file.tell()
        process = subprocess.Popen(
            [*command, "--only", run.name],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | share,
        )
    return _Job(run, process, share, path, said)


def _shares(jobs: int) -> list[dict[str, str]]:
    """Return the environment of each of n processes: its part of the cores, and a GPU in turn."""
    threads = max(1, threads_per_rank() // jobs)
    common = {STARTED_BY_SWEEP: "1", "OMP_NUM_THREADS": str(threads)}
    gpus = _gpus()
    if len(gpus) < 2:
        return [common] * jobs
    return [common | {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs)]


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return visible.split(",")
