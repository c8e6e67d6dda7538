"""The list of a dry run: what it says of each run, and how the times follow from one timed step."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from dist_adv import cli
from dist_adv.sweeps import estimate
from dist_adv.sweeps.sweep import Sweep, listing, load_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = CONFIGS / "digits"
SMALL = "{model.width: 4, train.batch_size: 16, train.epochs: 2, train.precision: fp32}"


def sweep(folder: Path, runs: str) -> Sweep:
    path = folder / "mine.yaml"
    path.write_text(f"base: {DIGITS}/natural.yaml\nset: {SMALL}\nruns:\n{runs}")
    return load_sweep(path)


@pytest.mark.parametrize("name", ["paper", "papers_compared", "width16"])
def test_a_run_is_a_line_of_100_columns(name: str) -> None:
    found = load_sweep(CONFIGS / f"sweeps/{name}.yaml")
    text = io.StringIO()
    seconds = {run.name: 4e7 for run in found.runs}
    Console(file=text, width=100).print(listing(found, seconds))
    _, head, _, *lines = text.getvalue().splitlines()
    titles = "run method model width epochs replays alpha batch seed ~time"
    assert " ".join(head.split()) == titles
    assert [line.split()[1] for line in lines] == [run.name for run in found.runs]
    assert "…" not in text.getvalue()


def test_what_a_line_says() -> None:
    text = io.StringIO()
    runs = load_sweep(CONFIGS / "sweeps/papers_compared.yaml")
    Console(file=text, width=100).print(listing(runs, {"wong-zero": 100.0}))
    lines = {
        line.split()[1]: " ".join(line.split()[2:]) for line in text.getvalue().splitlines()[3:]
    }
    assert lines["wong-zero"] == "fast, zero preact_resnet18 64 30 8/255 128 0 100 s"
    assert lines["wong-guard"] == "fast, stop preact_resnet18 64 30 16/255 128 0 ?"
    assert lines["wong-free-8"] == "free preact_resnet18 64 12 8 128 0 ?"
    assert lines["shafahi-pgd-7"] == "pgd-7 wide_resnet-32-10 16 206 2/255 128 0 ?"


def test_times_follow_from_passes_batches_and_steps(tmp_path: Path) -> None:
    """One network, timed once: of the same step each run has as many as it says."""
    found = estimate.estimate(
        sweep(
            tmp_path,
            f"""
            - {{name: natural}}
            - {{name: longer, set: {{train.epochs: 6}}}}
            - {{name: stopped, set: {{train.max_steps: 45}}}}
            - {{name: pgd-7, base: {DIGITS}/pgd.yaml}}
            - {{name: fast, base: {DIGITS}/fast.yaml}}
            - {{name: free-4, base: {DIGITS}/free.yaml}}
            - {{name: held-out, set: {{data.validation: 718}}}}
            """,
        )
    )
    assert found.troubles == {}
    (machine,) = found.machines
    assert machine.endswith(", fp32")
    one = found.seconds["natural"]
    assert one > 0
    assert {name: pytest.approx(seconds / one) for name, seconds in found.seconds.items()} == {
        "natural": 1,
        "longer": 3,
        "stopped": 45 / 180,
        "pgd-7": 17 / 3,
        "fast": 5 / 3,
        "free-4": 4,
        "held-out": 1 / 2,
    }


def test_what_is_timed_is_natural_also_where_values_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def measure(config, images, sizes, *rest):
        timed.append([stage.method.name for stage in config.stages.values()][-1])
        return dict.fromkeys(sizes, 0.01)

    monkeypatch.setattr(estimate, "measure_steps", measure)
    changing = (
        f"- {{name: changing, base: {DIGITS}/pgd.yaml, set: {{threat.eps: {{0: 0.1, 1: 0.2}}}}}}"
    )
    estimate.estimate(sweep(tmp_path, changing))
    assert set(timed) == {"natural"}


def test_what_cannot_be_timed_is_said_and_breaks_nothing(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(
        tmp_path,
        f"""
        - {{name: good}}
        - name: folder
          set: {{data.name: imagefolder, data.root: {images}, train.precision: bf16}}
        - {{name: no-images, set: {{data.name: imagefolder, data.root: {tmp_path}/none}}}}
        - {{name: one-left, set: {{train.batch_size: 1437}}}}
        - {{name: too-large, set: {{model.width: 100000}}}}
        """,
    )
    assert cli._run(["sweep", str(tmp_path / "mine.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    times = {line.split()[1]: line.split()[-1] for line in said.splitlines()[3:8]}
    assert times == {
        "good": "s",
        "folder": "s",
        **dict.fromkeys(["no-images", "one-left", "too-large"], "?"),
    }
    said = " ".join(said.split())
    assert "of training in all, one run after another, going by a few steps on " in said
    assert said.index(", bf16; ") < said.index(", fp32; evaluation not counted.")
    assert f"no-images: no time (data.root: {tmp_path}/none/train is no folder" in said
    assert "one-left: no time (train.batch_size: leaves a rank 1 image" in said
    assert "too-large: no time (rank 0 of 1 has no memory left" in said


def test_one_run_is_listed_without_timing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "estimate", lambda sweep: pytest.fail("steps were timed"))
    paper = str(CONFIGS / "sweeps/paper.yaml")
    assert cli._run(["sweep", paper, "--dry-run", "--only", "free-8"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed[3:]] == [["0", "free-8", "free"]]
    assert cli._run(["sweep", paper, "--dry-run", "--only", "fre-8"]) == 2
    assert "has no run 'fre-8'; did you mean 'free-8'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [1]), (2, [2]), (8, [2, 8]), (100, [2, 8, 32, 100])]
)
def test_batches_grow_up_to_the_runs_own(batch: int, sizes: list[int]) -> None:
    assert list(estimate._sizes(batch)) == sizes
