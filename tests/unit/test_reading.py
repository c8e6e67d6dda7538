"""One reader, one rule: which evaluations are a run's figures, wherever they are shown."""

import json
import shutil
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dist_adv import files
from dist_adv.config import load_config
from dist_adv.errors import UserError
from dist_adv.exports import export_run
from dist_adv.judging.finished_run import evaluate_run
from dist_adv.judging.measurement import Asked
from dist_adv.report import write_report
from dist_adv.report.text import notices
from dist_adv.runs import reading, status
from dist_adv.runs.folder import RunFolder
from dist_adv.runs.run import read_runs
from dist_adv.tracking.wandb_run import final
from dist_adv.training.run import train_run
from made_up_runs import epoch, evaluation, make_run, write_lines

DIGITS = Path(__file__).parents[2] / "configs" / "digits" / "fast.yaml"
IMAGES = 359  # for testing
SETTINGS = (
    *("model.width=2", "train.max_steps=1", "train.batch_size=256", "train.threads=1"),
    *("train.precision=fp32", "eval.every=0", "eval.attacks=[natural,pgd-2]"),
    "track.wandb.mode=disabled",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step that was evaluated as it was configured, on all test images."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train_run(load_config(DIGITS, SETTINGS), run, "auto")
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


def card(run: Path, out: Path) -> dict[str, dict[str, str]]:
    """The table of the model card of an export, by attack and title."""
    export_run(run, out)
    rows = [line for line in (out / "README.md").read_text().splitlines() if line[:1] == "|"]
    titles, _, *attacks = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    return {cells[0]: dict(zip(titles, cells, strict=True)) for cells in attacks}


def attacks_measured(run: Path, *overrides: str) -> list[str]:
    """What `train` still measures of a run whose training is over."""
    before = len(lines(run))
    train_run(load_config(DIGITS, [*SETTINGS, *overrides]), run, "auto")
    return [line["attack"] for line in lines(run)[before:]]


@pytest.mark.parametrize(
    ("attacks", "limit", "overrides"),
    [
        (["natural", "pgd-2"], 20, []),
        (["pgd-2"], None, ["threat.eps=1/255"]),
        (["pgd-2"], None, ["threat.norm=l2", "threat.eps=0.2"]),
    ],
    ids=["limit", "eps", "norm"],
)
def test_another_look_displaces_no_figure(
    attacks: list[str], limit: int | None, overrides: list[str], run: Path, tmp_path: Path
) -> None:
    """Neither in the model card nor in status, report or dashboards; and nothing is done again."""
    (natural, robust), accuracy = (
        lines(run),
        {line["attack"]: line["accuracy"] for line in lines(run)},
    )
    evaluate_run(run, Asked(attacks, limit, overrides))
    assert len(lines(run)) == 2 + len(attacks)
    found = card(run, tmp_path / "exported")
    assert {attack: int(row["images"]) for attack, row in found.items()} == {
        "natural": IMAGES,
        "pgd-2": IMAGES,
    }
    assert found["natural"]["accuracy"] == f"{natural['accuracy']:.2%}"
    assert found["pgd-2"] == {
        **{"attack": "pgd-2", "accuracy": f"{robust['accuracy']:.2%}", "images": str(IMAGES)},
        **{"95 % interval": found["pgd-2"]["95 % interval"], "norm": "linf", "radius": "0.2"},
        **{"steps": "2", "step size": "0.05", "restarts": "1", "start": "random", "loss": "ce"},
    }
    (shown,) = read_runs([run])
    assert {attack: figure.accuracy for attack, figure in shown.evaluations.items()} == accuracy
    assert final(shown)["final/robust"] == robust["accuracy"]
    assert status.read(run, "run").robust == ("pgd-2", robust["accuracy"])
    assert attacks_measured(run) == []


def test_what_is_not_shown_is_said(run: Path) -> None:
    evaluate_run(run, Asked(["pgd-2"], 20, ["threat.eps=1/255"]))
    (said,) = notices(read_runs([run]))
    assert "run: of its evaluations 1 within another threat" in said


@pytest.mark.parametrize(
    ("limit", "overrides"), [(20, []), (None, ["threat.eps=1/255"])], ids=["limit", "eps"]
)
def test_a_quick_look_is_not_the_evaluation(limit: int | None, overrides: list[str], run: Path):
    """A run that was killed before its evaluation, and looked at since, is still to be measured."""
    (run / "results.jsonl").unlink()
    evaluate_run(run, Asked(["pgd-2"], limit, overrides))
    assert attacks_measured(run, "eval.limit=30") == ["natural", "pgd-2"]
    assert attacks_measured(run, "eval.limit=30") == []
    assert attacks_measured(run) == ["natural", "pgd-2"]  # on all of them
    assert attacks_measured(run) == []


def figures(folder: Path, *results: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """(accuracy, n) by attack of a run within L-inf 8/255 on digits."""
    run = make_run(folder, results=list(results))
    found = reading.read_results(run, {"norm": "linf", "eps": 8 / 255}, "digits").figures
    return {attack: (figure.accuracy, figure.n) for attack, figure in found.items()}


def test_most_images_then_the_last(tmp_path: Path) -> None:
    """Another loss or step size on as many images is the newer figure of the same attack."""
    assert figures(
        tmp_path / "run",
        evaluation("pgd-10", 0.3),
        evaluation("pgd-10", 0.4, loss_fn="margin"),
        evaluation("pgd-10", 0.9, n=10),
        evaluation("pgd-10", 0.1, dataset="cifar10"),
        evaluation("pgd-10", 0.2, n=5000, eps=4 / 255),
        evaluation("natural", 0.8, n=10, dataset="cifar10"),
    ) == {"pgd-10": (0.4, 1000)}


@pytest.mark.parametrize("other", [{"fingerprint": "b"}, {"size": [16, 16]}, {"shorter": 9}])
@pytest.mark.parametrize("told", [True, False], ids=["told by training", "of the first"])
def test_figures_of_other_images_of_the_same_name_do_not_count(
    other: dict[str, Any], told: bool, tmp_path: Path
) -> None:
    """As of `data.root` elsewhere. Earlier versions have not told what the run's own are."""
    own = {"fingerprint": "a", "size": [8, 8], "shorter": 8}
    lines = [
        evaluation("pgd-10", 0.4, **own),
        evaluation("pgd-10", 0.1, **own | other),
        evaluation("natural", 0.8),
    ]
    run = make_run(
        tmp_path / "run", results=[evaluation("pgd-2", 0.2, dataset="x", fingerprint="x"), *lines]
    )
    if told:
        env = json.loads((run / "env.json").read_text())
        env["dataset"] |= own
        (run / "env.json").write_text(json.dumps(env))
        write_lines(run / "results.jsonl", [lines[1], *lines])
    found = reading.read_results(run, {"norm": "linf", "eps": 8 / 255}, "digits")
    accuracies = {attack: figure.accuracy for attack, figure in found.figures.items()}
    assert accuracies == {"pgd-10": 0.4, "natural": 0.8}
    assert found.elsewhere == 2


def test_a_quick_look_leaves_the_pictures(run: Path) -> None:
    before = (run / "examples.safetensors").read_bytes()
    evaluate_run(run, Asked(["fgsm"], 20))
    assert (run / "examples.safetensors").read_bytes() == before
    evaluate_run(run, Asked(["fgsm"]))
    assert read_runs([run])[0].examples.attack == "fgsm"


def test_figures_of_weights_that_were_set_aside_are_none_of_the_longer_run(tmp_path: Path) -> None:
    """A run that was made longer, and has not been evaluated again yet."""
    results = [evaluation("pgd-10", 0.3, step=40)]
    assert figures(tmp_path / "a", *results) == {"pgd-10": (0.3, 1000)}
    RunFolder(make_run(tmp_path / "b")).weights_of_shorter_run(40).touch()
    write_lines(tmp_path / "b/results.jsonl", results)
    assert reading.read_results(tmp_path / "b", {"norm": "linf", "eps": 8 / 255}, "digits") == (
        reading.Results({}, 0)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracy": float("nan")}, "line 2 is no such record (accuracy: "),
        ({"accuracy": "high"}, "line 2 is no such record (accuracy: "),
        ({"accuracy": 43.0}, "line 2 is no such record (accuracy: "),
        ({"n": 0}, "line 2 is no such record (n: "),
        ({"ci95": [0.1]}, "line 2 is no such record (ci95"),
        ({"ci95": [0.1, float("inf")]}, "line 2 is no such record (ci95.1: "),
        ({"attack": ["pgd-10"]}, "line 2 is no such record (attack: "),
        ({"accuracy": "0.4"}, "line 2 is no such record (accuracy: "),
        ({"eps": "8/255"}, "line 2 is no such record (eps: "),
        ({"flags": "weak"}, "line 2 is no such record (flags: "),
    ],
)
def test_a_line_that_is_no_evaluation_is_named(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """By the report, and in the run's own row of status, where the others stay."""
    damaged = [evaluation("natural", 0.9), {**evaluation("pgd-10", 0.4), **change}]
    run = make_run(tmp_path / "run", results=damaged)
    with pytest.raises(UserError) as raised:
        write_report([run], tmp_path / "out")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    shown, other = status.gather([run, make_run(tmp_path / "other")])
    assert said in shown.reason
    assert other.reason == ""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"\0" * 300_000,
        b"\xff\xfe\x00" * 9,
        b"[" * 3000,
        b"{",
        b'"text"',
        b'{"a": NaN}',
    ],
    ids=["empty", "blank", "zeros", "binary", "deep", "torn", "text", "other"],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "results.jsonl"])
def test_garbage_is_one_line_or_nothing(name: str, content: bytes, tmp_path: Path) -> None:
    for end in (b"", b"\n", b"\n" + content + b"\n"):
        run = make_run(tmp_path / f"run-{len(end)}")
        (run / name).write_bytes(content + end)
        with suppress(UserError):  # and nothing else
            read_runs([run])
        (shown,) = status.gather([run])
        assert "\n" not in shown.reason


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    more = {"colour": "red", "parts": [1, {"a": None}]}
    metrics = [epoch(1, 30.0, **more), {**epoch(2, 60.0), "test_loss": float("nan")}]
    run = make_run(tmp_path / "run", metrics=metrics, results=[evaluation("pgd-10", 0.4, **more)])
    assert write_report([run], tmp_path / "out").exists()
    assert status.read(run, "run").epochs == 2.0


# --- long files ----------------------------------------------------------------------------------


def train(step: int) -> dict[str, Any]:
    return {"kind": "train", "epoch": step / 1000, "step": step, "seconds": 0.5 * step}


def test_lines_from_the_end(tmp_path: Path) -> None:
    """Whatever lies on the edges of the blocks that are read."""
    path = tmp_path / "lines"
    for content in (
        b"",
        b"\n",
        b"a",
        b"a\nb",
        b"a\n\nb\n",
        b"x" * 200_000,
        b"x" * 65535 + b"\ny\n",
    ):
        path.write_bytes(content)
        assert list(files.backwards(path)) == content.splitlines(keepends=True)[::-1]
    content = b"".join(b"%d " % n * (n % 97) + b"\n" for n in range(5000)) + b"torn"
    path.write_bytes(content)
    assert list(files.backwards(path)) == content.splitlines(keepends=True)[::-1]
    files.drop_torn_line(path)
    assert path.read_bytes() == content.removesuffix(b"torn")
    path.write_bytes(b'{"a": 1}\n{"b": 2}')  # as an editor may leave it
    files.drop_torn_line(path)
    assert path.read_bytes() == b'{"a": 1}\n{"b": 2}\n'


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an epoch and then 40,000 lines of a next one: three megabytes."""
    run = make_run(tmp_path_factory.mktemp("long") / "run", finished=False)
    metrics = [epoch(1, 5.0), *map(train, range(11, 40_011))]
    write_lines(run / "metrics.jsonl", metrics)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    return run


def peak(work: Any) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_status_reads_the_tail_of_a_long_run(long: Path) -> None:
    """Not even the three megabytes of the file, far less its 40,000 objects, are in memory."""
    found: list[status.Status] = []
    assert peak(lambda: found.append(status.read(long, "run"))) < 1_000_000
    assert (found[0].step, found[0].robust) == (40_010, ("pgd-10", 0.175))


def test_a_report_keeps_the_passes_of_a_long_run(long: Path) -> None:
    assert peak(lambda: read_runs([long])) < 1_000_000
    (run,) = read_runs([long])
    assert (run.steps, len(run.epochs), len(run.metrics)) == (40_010, 1, 40_001)


def test_a_torn_line_of_a_long_run_is_cut_without_reading_it(long: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(long / "metrics.jsonl", tmp_path))
    assert peak(lambda: files.drop_torn_line(path)) < 1_000_000
    assert path.read_bytes() == (long / "metrics.jsonl").read_bytes().removesuffix(b'{"kind": "tr')
