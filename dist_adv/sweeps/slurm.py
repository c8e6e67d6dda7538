"""A sweep as a job array on Slurm, and behind it a job that writes the report.

The site's options are launch/slurm/site.sh's, which submit.sh beside it knows how to read.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from dist_adv import files, packages
from dist_adv.errors import RunFailure, UserError
from dist_adv.runs.lock import Lock
from dist_adv.runs.status import SLURM_JOB, log_of
from dist_adv.sweeps.sweep import REPORT, Sweep, check, claim


def plan(sweep: Sweep, out: Path, limit: int | None) -> list[str]:
    """Return the commands that `submit` would run; ARRAY stands for a number that only it knows."""
    array, report = _array(sweep, out, limit), _report(out, "ARRAY")
    return [_submit("--dry-run", *arguments) for arguments in (array, report)]


def submit(sweep: Sweep, out: Path, limit: int | None) -> list[str]:
    """Make `out` the folder of the sweep and submit its runs; says what was submitted.

    limit: at most so many runs at once. Raises UserError where Slurm does not take it, and where
    an earlier submission of this folder is still in the queue.
    """
    if not shutil.which("sbatch"):
        raise UserError("--slurm: no sbatch on this machine; run this on a node of the cluster")
    check(sweep, out)
    lock = Lock(out, "--out")
    try:
        _check_not_queued(out)
        claim(sweep, out)  # what is queued reads what it writes
        log_of(out, sweep.name).parent.mkdir(exist_ok=True)
        array = _number(_submit(*_array(sweep, out, limit)))
        files.replace(out / SLURM_JOB, array.encode())
        try:
            report = _number(_submit(*_report(out, array)))
        except UserError as error:
            raise RunFailure(
                f"job {array} runs the sweep, but the report was not submitted ({error}); "
                f"later: {_scripts()}/submit.sh {_scripts()}/report.sbatch {out}"
            ) from None
    finally:
        lock.release()
    return [
        f"job {array}: the {len(sweep.runs)} runs of {sweep.name}",
        f"job {report}: the report, when they have ended, in {out / REPORT}",
        f"dist-adv status {out} shows what becomes of them",
    ]


def _array(sweep: Sweep, out: Path, limit: int | None) -> list[str]:
    tasks = f"--array=0-{len(sweep.runs) - 1}" + (f"%{limit}" if limit else "")
    script = _scripts() / "sweep.sbatch"
    return [
        tasks,
        f"--job-name={sweep.name}",
        f"--output={log_of(out, '%A_%a')}",
        str(script),
        str(out),
    ]


def _report(out: Path, array: str) -> list[str]:
    after = f"--dependency=afterany:{array}"
    return [
        after,
        f"--output={log_of(out, 'report-%j')}",
        str(_scripts() / "report.sbatch"),
        str(out),
    ]


def _submit(*arguments: str) -> str:
    """Return what submit.sh says; a job has one GPU (or process), unless RANKS says otherwise."""
    done = subprocess.run(
        ["bash", str(_scripts() / "submit.sh"), *arguments],
        env={"RANKS": "1", **os.environ},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("dist-adv: "))
    return done.stdout.strip()


def _number(said: str) -> str:
    found = re.search(r"Submitted batch job (\d+)", said)
    if not found:
        raise RunFailure(f"sbatch: no number of a job in what it says ({said!r})")
    return found[1]


def _check_not_queued(out: Path) -> None:
    try:
        job = (out / SLURM_JOB).read_text().strip()
    except FileNotFoundError:
        return
    # It fails for a job that Slurm has forgotten.
    queue = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True
    )
    if queue.stdout.strip():
        raise UserError(
            f"{out}: job {job} of this sweep is still in the queue; wait for it, or scancel {job}"
        )


def _scripts() -> Path:
    return packages.shipped("launch") / "slurm"
