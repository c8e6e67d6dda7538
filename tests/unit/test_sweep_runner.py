"""What each process of a sweep is given, and what is said of one that did not end well."""

import subprocess
from pathlib import Path

import pytest

from dist_adv import cli
from dist_adv.distributed.stopping import STARTED_BY_SWEEP
from dist_adv.errors import RunFailure
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.lock import Lock
from dist_adv.sweeps import local
from dist_adv.sweeps.sweep import SweepRun, claim, load_sweep

DIGITS = Path(__file__).parents[2] / "configs" / "sweeps" / "digits.yaml"


def test_gpus_are_dealt_out_and_cores_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    shares = local._shares(3)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["2", "GPU-5", "2"]
    assert [share["OMP_NUM_THREADS"] for share in shares] == ["4"] * 3
    assert all(STARTED_BY_SWEEP in share for share in shares)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (share, *_) = local._shares(20)
    assert "CUDA_VISIBLE_DEVICES" not in share  # the only one is what it sees anyway
    assert share["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("echo dist-adv: first; echo dist-adv: the disk is full; exit 1", "the disk is full"),
        ("echo Traceback; exit 3", "exit status 3; see LOG"),
        ("kill -9 $$", "ended by SIGKILL; see LOG"),
    ],
)
def test_why_a_run_failed(does: str, reason: str, tmp_path: Path) -> None:
    """A shell stands in for the process of the run; an earlier start has complained, too."""
    log = tmp_path / "run.txt"
    before = log.write_text("dist-adv: of yesterday\n")
    with log.open("a") as file:
        process = subprocess.Popen(["sh", "-c", does], stdout=file)
    process.wait()
    job = local._Job(load_sweep(DIGITS).runs[0], process, {}, log, before)
    assert job.trouble() == reason.replace("LOG", str(log))


def test_a_run_that_has_stopped_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell stands in for the process of each, and leaves as after train.max_minutes."""

    def start(run: SweepRun, out: Path, share: dict[str, str]) -> local._Job:
        (out / run.name).mkdir()
        RunFolder(out / run.name).mark("preempted", reason="train.max_minutes")
        process = subprocess.Popen(["sh", "-c", "exit 143"])
        return local._Job(run, process, share, out / "log", 0)

    monkeypatch.setattr(local, "_start", start)
    sweep = load_sweep(DIGITS)
    with pytest.raises(RunFailure) as failure:
        local.run_sweep(sweep, tmp_path / "out", jobs=len(sweep.runs))
    why = "; ".join(f"{run.name} preempted: train.max_minutes" for run in sweep.runs)
    assert str(failure.value) == f"{len(sweep.runs)} of {len(sweep.runs)} runs are not done ({why})"


def test_cores_are_for_the_runs_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local, "_gpus", lambda: [])
    runs = local._Runs(load_sweep(DIGITS), tmp_path, jobs=6)
    assert [share["OMP_NUM_THREADS"] for share in runs.shares] == ["3"] * 4


def test_a_sweep_that_is_refused_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the runs of one that is running read."""
    out = tmp_path / "out"
    claim(load_sweep(DIGITS), out)
    before = (out / "sweep.yaml").read_text()
    lock = Lock(out, "--out")
    assert cli._run(["sweep", str(DIGITS), "--out", str(out), "train.epochs=30"]) == 2
    lock.release()
    assert "is in use by process" in capsys.readouterr().err
    assert (out / "sweep.yaml").read_text() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--slurm", "--jobs", "4"), "--jobs is of this machine"),
        (("--slurm", "--only", "fast"), "--only takes one run here"),
        (("--wandb", "--only", "fast"), "--only takes one run here"),
    ],
)
def test_options_that_do_not_go_together(options: tuple[str, ...], said: str, capsys) -> None:
    assert cli._run(["sweep", str(DIGITS), *options]) == 2
    assert said in capsys.readouterr().err


def test_under_a_launcher_a_sweep_needs_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert cli._run(["sweep", str(DIGITS), "--out", str(tmp_path / "out")]) == 2
    assert "use no launcher, or --only RUN under it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
