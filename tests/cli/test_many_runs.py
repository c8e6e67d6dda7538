"""What a shell makes of `runs/*`: runs, and what else lies there."""

from pathlib import Path

import pytest
import yaml

from dist_adv import cli
from made_up_runs import evaluation, make_run

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's folder after it has ended, of whose runs one has not begun; called runs/paper."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no Slurm to be asked
    monkeypatch.setenv("COLUMNS", "200")
    folder = Path("runs/paper")
    for name in ("seed-0", "seed-1"):
        make_run(folder / name, results=[evaluation("natural", 0.9)])
    runs = [{"name": name, "set": {}} for name in ("seed-1", "seed-0", "seed-2")]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"runs": runs}))
    (folder / "logs").mkdir()
    (folder / "logs/seed-0.txt").touch()
    (folder / "report/figures").mkdir(parents=True)
    (folder / "report/report.html").touch()
    return folder


def reported(page: Path) -> list[str]:
    lines = (page / "results.csv").read_text().splitlines()[1:]
    return [line.split(",")[0] for line in lines]


def test_a_report_passes_over_what_is_no_run(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [str(path) for path in sorted(sweep.iterdir())]
    assert cli._run(["report", *named, "--out", "new"]) == 0
    assert reported(Path("new")) == ["seed-0", "seed-1"]
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "passed over, no run folders: runs/paper/logs, runs/paper/report, runs/paper/sweep.yaml"
    ]


def test_a_sweep_stands_for_its_runs(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order in its file, beside runs that are named; one without a folder is none yet."""
    make_run(Path("runs/other"), results=[evaluation("natural", 0.5)])
    assert cli._run(["report", str(sweep), "runs/other", "--out", "new"]) == 0
    assert reported(Path("new")) == ["seed-1", "seed-0", "other"]
    assert capsys.readouterr().err == ""


def test_status_passes_over_what_is_no_run(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [str(path) for path in sorted(sweep.iterdir())]
    assert cli._run(["status", *named]) == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines() if "runs/" in line] == [
        "runs/paper/seed-0",
        "runs/paper/seed-1",
    ]
    assert said.err.count("runs/paper/report") == 1


def test_nothing_is_a_run(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither what else lies there nor a pattern that the shell has found nothing for."""
    for command in ("report", "status", "sync"):
        for named in (["runs/paper/logs", "runs/paper/sweep.yaml"], ["runs/none/*"]):
            assert cli._run([command, *named]) == 2
            said = capsys.readouterr().err
            assert said.startswith("dist-adv: ")
            assert said.count("\n") == 1
    assert not Path("report").exists()
