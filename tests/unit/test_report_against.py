"""Runs beside published figures, and runs of several seeds, from run folders made up here."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import markdown_table, report_on

from dist_adv.config import load_config
from dist_adv.errors import UserError
from dist_adv.report import write_report
from dist_adv.report.against import Pair, set_beside
from dist_adv.report.published import load_published
from dist_adv.report.seeds import seed_tables
from dist_adv.runs.run import Run, read_runs
from made_up_runs import epoch, evaluation, make_run, write_lines

pytestmark = pytest.mark.usefixtures("undrawn")

CONFIGS = Path(__file__).parents[2] / "configs"
# The paper's own settings; the four epochs of `make_run` are its 45.
PAPER = {
    "model": {"name": "preact_resnet18", "width": 64, "norm": "batch"},
    "data": {
        "name": "cifar10",
        "root": "data",
        "augment": True,
        "crop_padding": None,
        "drop_last": False,
        "validation": 0,
    },
    "optim": {
        "lr": 0.2,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "cyclic",
        "rise": 0.5,
        "cycle_momentum": True,
    },
    "train": {"epochs": 45, "batch_size": 128, "precision": "fp16", "seed": 0, "max_steps": None},
    "track": {"tensorboard": False},
}
FREE = {"name": "free", "guard": "none", "replays": 8}
FAST = {"name": "fast", "guard": "warn", "alpha": 10 / 255, "init": "random"}


def full_run(
    folder: Path,
    method: dict[str, Any],
    results: list[dict[str, Any]] | None = None,
    ranks: int = 1,
    **changes: dict[str, Any],
) -> Run:
    """A run of the paper's settings in which `changes` differ: train={"epochs": 4}."""
    epochs = changes.get("train", {}).get("epochs", 45)
    make_run(folder, method, metrics=[epoch(epochs, 600.0)], results=results)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for section, options in PAPER.items():
        config[section] = options | changes.get(section, {})
    config["threat"] |= changes.get("threat", {})
    config |= {key: changes[key] for key in ("awp", "average") if key in changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    home = {"dataset": config["data"]["name"]}
    write_lines(folder / "results.jsonl", [line | home for line in results or []])
    env = json.loads((folder / "env.json").read_text())
    env |= {"world_size": ranks, "precision": config["train"]["precision"]}
    (folder / "env.json").write_text(json.dumps(env))
    (run,) = read_runs([folder])
    return run


def pairs_of(run: Run, against: str = "paper") -> list[Pair]:
    """Those with the run; not the rows for which there is none."""
    pairs = set_beside([run], load_published([against])[against])
    return [pair for pair in pairs if pair.run]


def results_of(n: int = 10_000, **accuracies: float) -> list[dict[str, Any]]:
    return [evaluation(name.replace("_", "-"), value, n) for name, value in accuracies.items()]


def free(pgd_50: float, n: int = 10_000) -> list[dict[str, Any]]:
    """Beside 83.9, 49.8, 48.6 and 48.3 of the paper's Free with m = 8."""
    return results_of(n, natural=0.838, pgd_10=0.5, pgd_20=0.486, pgd_50=pgd_50)


def test_differences_in_points(tmp_path: Path) -> None:
    """The intervals at 10,000 images: 83.8 +- 0.7, 50.0 +- 1.0, 48.6 +- 1.0, 47.0 +- 1.0."""
    (pair,) = pairs_of(full_run(tmp_path / "run", FREE, free(0.47), optim={"lr": 0.04}))
    differences = {figure.attack: figure.difference for figure in pair.figures}
    by_hand = {"natural": -0.1, "pgd-10": 0.2, "pgd-20": 0.0, "pgd-50": -1.3}
    assert differences == pytest.approx(by_hand, abs=1e-9)
    assert [figure.inside for figure in pair.figures] == [True, True, True, False]
    assert (pair.verdict, pair.differences) == ("differs", [])


def test_reproduced_needs_every_published_accuracy(tmp_path: Path) -> None:
    all_of_them = full_run(tmp_path / "all", FREE, free(0.475), optim={"lr": 0.04})
    without_pgd_50 = full_run(tmp_path / "some", FREE, free(0)[:3], optim={"lr": 0.04})
    assert [pair.verdict for pair in pairs_of(all_of_them)] == ["reproduced"]
    assert [pair.verdict for pair in pairs_of(without_pgd_50)] == ["not all evaluated"]


def test_published_0_is_inside_an_interval_that_begins_an_ulp_above(tmp_path: Path) -> None:
    nothing = evaluation("pgd-10", 0.0, 10_000, ci95=[5e-17, 4e-4])
    (pair,) = pairs_of(full_run(tmp_path / "run", FAST | {"alpha": 16 / 255}, [nothing]))
    assert pair.figures[0].inside


@pytest.mark.slow
def test_page_csv_and_what_was_not_run(tmp_path: Path) -> None:
    full_run(tmp_path / "free", FREE, free(0.47), optim={"lr": 0.04})
    full_run(tmp_path / "pgd", {"name": "pgd", "steps": 7}, free(0.5))
    folders = [tmp_path / "free", tmp_path / "pgd"]
    report = report_on(folders, tmp_path / "out", ["paper", "wong2020"])
    table = markdown_table(report, "Against Capaldi and Capozzi 2020 (Free vs Fast)")
    header, _, ours, without_row, *not_run = [
        [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in table
    ]
    assert header[:4] == ["Run", "Published row", "Natural", "PGD-10"]
    assert ours == [
        "free",
        "Free, m = 8 (preact_resnet18, 45 epochs, batch 128; log, natural 83.6)",
        "83.8 vs 83.9 (\N{MINUS SIGN}0.1, inside 83.1\N{EN DASH}84.5)",
        "50.0 vs 49.8 (+0.2, inside 49.0\N{EN DASH}51.0)",
        "48.6 vs 48.6 (+0.0, inside 47.6\N{EN DASH}49.6)",
        "47.0 vs 48.3 (\N{MINUS SIGN}1.3, outside 46.0\N{EN DASH}48.0)",
        "10.0 min (vs 88 min)",
        "differs",
    ]
    assert without_row[:3] == ["pgd", "none of this method, model and threat", "-"]
    assert len(not_run) == 14 - 1
    assert {row[0] for row in not_run} == {"not run"}
    assert not_run[0][1:4] == [
        "Free, m = 2 (preact_resnet18, 45 epochs, batch 128)",
        "- vs 89.5",
        "- vs 32.4",
    ]
    for text in (report.html, report.markdown):
        assert "Verdicts: reproduced, if all published accuracies" in text
    with (tmp_path / "out" / "against.csv").open(newline="") as file:
        rows = {(row["against"], row["run"], row["attack"]): row for row in csv.DictReader(file)}
    row = rows["paper", "free", "pgd-50"]
    assert float(row["difference"]) == pytest.approx(-1.3)
    assert (row["published"], row["inside_ci95"], row["verdict"]) == ("48.3", "False", "differs")
    assert ("wong2020", "pgd", "natural") in rows

    write_report(folders, tmp_path / "out")
    assert not (tmp_path / "out" / "against.csv").exists()


def about(pair: Pair) -> tuple[Any, ...]:
    """What tells rows of one method apart."""
    assert pair.row
    keys = ("method.guard", "train.batch_size", "train.epochs")
    return tuple(pair.row.settings.get(key) for key in keys)


@pytest.mark.parametrize(
    ("against", "method", "train", "rows"),
    [
        ("paper", FAST, {}, [("none", 128, 45)]),
        ("paper", FAST, {"batch_size": 256, "epochs": 90}, [("none", 256, 45)]),
        ("paper", FAST, {"batch_size": 512}, [("none", 256, 45)]),
        ("paper", FAST, {"epochs": 60}, [("none", 128, 45)]),
        # Of this run two rows were published: at its best and at its end.
        ("paper", FAST, {"epochs": 80}, [("none", 128, 90), ("none", 128, 90)]),
        ("paper", FAST | {"alpha": 0.0392}, {}, [("none", 128, 45)]),
        ("paper", FAST | {"alpha": 9 / 255}, {}, []),
        ("paper", FAST | {"init": "zero"}, {}, []),
        ("paper", FREE | {"replays": 3}, {}, []),
        ("paper", {"name": "natural"}, {}, []),
        ("wong2020", FAST | {"alpha": 16 / 255, "guard": "stop"}, {}, [("stop", 128, 30)]),
        ("wong2020", FAST | {"alpha": 16 / 255, "guard": "warn"}, {}, [("none", 128, 30)]),
        # The paper stops no run: the row is the nearest there is.
        ("paper", FAST | {"guard": "stop"}, {}, [("none", 128, 45)]),
        ("shafahi2019", FREE, {}, []),
    ],
)
def test_nearest_row(
    against: str,
    method: dict[str, Any],
    train: dict[str, Any],
    rows: list[tuple[Any, ...]],
    tmp_path: Path,
) -> None:
    pairs = pairs_of(full_run(tmp_path / "run", method, train=train), against)
    assert [about(pair) for pair in pairs if pair.row] == rows
    assert len(pairs) == max(1, len(rows))


@pytest.mark.parametrize(
    ("rule", "differences"),
    [
        ({"guard_rule": "wong"}, []),
        ({"guard_rule": "gap"}, ["guard rule gap instead of wong"]),
        ({}, []),  # a run from when there was no other
    ],
)
def test_their_early_stop_is_by_their_rule(
    rule: dict[str, str], differences: list[str], tmp_path: Path
) -> None:
    method = FAST | {"alpha": 16 / 255, "guard": "stop"} | rule
    (pair,) = pairs_of(full_run(tmp_path / "run", method, train={"epochs": 30}), "wong2020")
    assert [each for each in pair.differences if "guard" in each] == differences


def test_another_threat_or_model_has_no_row(tmp_path: Path) -> None:
    larger = full_run(tmp_path / "eps", FAST, threat={"eps": 12 / 255})
    deeper = full_run(tmp_path / "model", FREE, model={"name": "wide_resnet"})
    assert [pair.row for run in (larger, deeper) for pair in pairs_of(run)] == [None, None]


def test_the_best_weights_are_not_the_final_ones(tmp_path: Path) -> None:
    collapsed = results_of(natural=0.904, pgd_50=0.003)
    best, final = pairs_of(full_run(tmp_path / "run", FAST, collapsed, train={"epochs": 90}))
    assert best.differences == ["weights final instead of best on the test images (epoch 84)"]
    assert [best.verdict, final.verdict] == ["not the same experiment", "reproduced"]


def test_every_difference_is_said(tmp_path: Path) -> None:
    run = full_run(
        tmp_path / "run",
        FAST | {"guard": "stop"},
        [evaluation("natural", 0.847), evaluation("pgd-10", 0.48, step_size=1 / 255)],
        ranks=2,
        model={"width": 16},
        data={"name": "imagefolder", "root": "/elsewhere", "augment": False, "crop_padding": 0},
        optim={"lr": 0.1, "schedule": "multistep", "cycle_momentum": False},
        train={"epochs": 4, "batch_size": 200, "precision": "bf16", "label_smoothing": 0.3},
        awp={"gamma": 0.005, "start": 0},
        average={"epochs": 0.5},
    )
    (pair,) = pairs_of(run)
    assert sorted(pair.differences) == [
        "augment false instead of true",
        "average epochs 0.5 instead of null",
        "awp gamma 0.005 start 0 instead of null",
        "batch 200 instead of 256",
        "crop padding 0 instead of null",
        "cycle momentum false instead of true",
        "data imagefolder instead of cifar10",
        "epochs 4 instead of 45",
        "guard stop instead of none",
        "label smoothing 0.3 instead of 0.0",
        "lr 0.1 instead of 0.2",
        "precision bf16 instead of fp16",
        "ranks 2 instead of 1",
        "schedule multistep instead of cyclic",
        "step size 1/255 instead of 2/255",
        "test images 1000 instead of 10000",
        "width 16 instead of 64",
    ]
    assert pair.verdict == "not the same experiment"


@pytest.mark.parametrize(
    "added",
    [
        {"awp": {"gamma": 0.005, "start": 0}},
        {"average": {"epochs": 2}},
        {"train": {"label_smoothing": 0.1}},
        {"train": {"start": "runs/natural"}},
        {"data": {"extra": {"path": "edm.npz", "fraction": 0.7}}},
        {"data": {"cutmix": 1.0}},
        {"threat": {"warmup": 5.0}},
        {"optim": {"lr": 0.04, "name": "adamw"}},
        {"optim": {"lr": 0.04, "nesterov": True}},
        {"optim": {"lr": 0.04, "decay_norms": False}},
    ],
)
def test_what_no_publication_has_makes_another_experiment(
    added: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    run = full_run(tmp_path / "run", FREE, free(0.475), **{"optim": {"lr": 0.04}} | added)
    (pair,) = pairs_of(run)
    assert pair.verdict == "not the same experiment"
    assert len(pair.differences) == 1


def by_epoch(folder: Path, **values: str) -> Run:
    """Write into env.json what training says of values that change."""
    env = json.loads((folder / "env.json").read_text()) | {"by_epoch": values}
    (folder / "env.json").write_text(json.dumps(env))
    (run,) = read_runs([folder])
    return run


def test_values_by_epoch_make_another_experiment(tmp_path: Path) -> None:
    """Also where the last of them are the published ones."""
    full_run(tmp_path / "run", FREE, free(0.475), optim={"lr": 0.04})
    (pair,) = pairs_of(by_epoch(tmp_path / "run", **{"0": "batch 512", "3": "batch 128"}))
    assert pair.verdict == "not the same experiment"
    assert pair.differences == ["other values by epoch: batch 512; batch 128"]


def test_an_attack_in_eval_mode_makes_another_experiment(tmp_path: Path) -> None:
    (pair,) = pairs_of(full_run(tmp_path / "run", FAST | {"attack_mode": "eval"}, free(0.475)))
    assert "attack mode eval instead of train" in pair.differences


def test_a_run_that_has_not_finished_or_was_kept_short(tmp_path: Path) -> None:
    make = {"method": FREE, "results": free(0.47), "optim": {"lr": 0.04}}
    short = full_run(tmp_path / "short", train={"max_steps": 100}, **make)
    unfinished = replace(full_run(tmp_path / "run", **make), finished=False)
    assert unfinished.last
    unfinished.last["epoch"] = 9
    pairs = pairs_of(short) + pairs_of(unfinished)
    assert [pair.differences for pair in pairs] == [
        ["max steps 100 instead of null"],
        ["unfinished: 9 of 45 epochs"],
    ]
    assert {pair.verdict for pair in pairs} == {"not the same experiment"}


def test_fewer_images_and_another_precision_leave_a_verdict(tmp_path: Path) -> None:
    changes = {"optim": {"lr": 0.04}, "train": {"precision": "bf16"}}
    run = full_run(tmp_path / "run", FREE, free(0.47, n=1000), **changes)
    (pair,) = pairs_of(run)
    assert pair.differences == [
        "precision bf16 instead of fp16",
        "test images 1000 instead of 10000",
    ]
    assert pair.verdict == "reproduced"  # 47.0 +- 3.1 holds 48.3


def test_one_start_instead_of_ten_is_a_weaker_attack(tmp_path: Path) -> None:
    results = results_of(natural=0.838, pgd_50=0.461)
    settings = {"train": {"epochs": 30}, "model": {"shortcut": "raw"}}
    (pair,) = pairs_of(full_run(tmp_path / "run", FAST, results, **settings), "wong2020")
    assert [figure.attack for figure in pair.figures] == ["natural", "pgd-50-10"]
    assert pair.differences == ["restarts 1 instead of 10"]
    assert pair.verdict == "not the same experiment"


def test_a_run_from_before_there_was_a_choice_of_shortcuts(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", FAST, results_of(natural=0.838), train={"epochs": 30})
    (pair,) = pairs_of(run, "wong2020")
    assert pair.differences == ["shortcut activated instead of raw"]


@pytest.mark.parametrize(
    ("against", "files", "without_row"),
    [
        ("paper", "paper/*.yaml", {"natural", "pgd-7"}),
        ("wong2020", "papers-compared/wong-*.yaml", set()),
        ("shafahi2019", "papers-compared/shafahi-*.yaml", set()),
    ],
)
def test_the_experiments_of_configs_are_the_published_ones(
    against: str, files: str, without_row: set[str], tmp_path: Path
) -> None:
    """Each is its row in all but where it runs, and quotes its figures."""
    experiments = [path for path in CONFIGS.glob(files) if not path.stem.endswith("base")]
    for path in experiments:
        make_run(tmp_path / path.stem)
        (tmp_path / path.stem / "config.yaml").write_text(load_config(path).dump())
    source = load_published([against])[against]
    pairs = set_beside(read_runs([tmp_path / path.stem for path in experiments]), source)
    assert {pair.run.label for pair in pairs if pair.run and not pair.row} == without_row
    for pair in pairs:
        assert pair.run, "a row without a configuration"
        if pair.row and "as published" not in pair.row.remark:
            assert {each.split()[0] for each in pair.differences} <= {"precision", "ranks"}
            (path,) = (each for each in experiments if each.stem == pair.run.label)
            quoted = {float(number) for number in re.findall(r"([0-9.]+) %", path.read_text())}
            assert set(pair.row.percent.values()) <= quoted, path


def test_unknown_name_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose from paper, wong2020, shafahi2019"):
        write_report([make_run(tmp_path / "run")], tmp_path / "out", ["xyz"])
    assert not (tmp_path / "out").exists()


def seeded(folder: Path, seed: int, seconds: float, pgd_10: float | None, lr: float = 0.2) -> Path:
    results = [evaluation("natural", 0.8)]
    if pgd_10 is not None:
        results.append(evaluation("pgd-10", pgd_10))
    full_run(
        folder,
        FAST,
        results,
        train={"epochs": 4, "seed": seed},
        optim={"lr": lr},
        data={"root": str(folder)},
        track={"tensorboard": seed == 1},
    )
    write_lines(folder / "metrics.jsonl", [epoch(4, seconds)])
    return folder


@pytest.mark.slow
def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    """40, 42 and 47 deviate from 43 by -3, -1 and 4: sqrt((9 + 1 + 16) / 2) = 3.606.

    100, 110 and 150 s deviate from 120 s by -20, -10 and 30: sqrt(1400 / 2) = 26.46.
    """
    folders = [
        seeded(tmp_path / "a", 0, 100, 0.40),
        seeded(tmp_path / "b", 1, 110, 0.42),
        seeded(tmp_path / "c", 2, 150, 0.47),
        seeded(tmp_path / "other", 3, 900, 0.9, lr=0.1),
        seeded(tmp_path / "unfinished", 4, 900, None),
    ]
    (folders[-1] / "model.safetensors").unlink()
    report = report_on(folders, tmp_path / "out")
    header, _, *rows = markdown_table(report, "Seeds")
    assert header == ["Runs", "Method", "n", "Seeds", "Natural", "PGD-10", "Training time"]
    assert rows == [
        [
            "a, b, c",
            "Fast, alpha 10/255, init random",
            "3",
            "0, 1, 2",
            "80.00 (\N{PLUS-MINUS SIGN} 0.00)",
            "43.00 (\N{PLUS-MINUS SIGN} 3.61)",
            "2.0 min (\N{PLUS-MINUS SIGN} 26 s)",
        ]
    ]


def test_seeds_say_how_many_were_evaluated(tmp_path: Path) -> None:
    folders = [
        seeded(tmp_path / "a", 0, 100, 0.40),
        seeded(tmp_path / "b", 1, 100, 0.44),
        seeded(tmp_path / "c", 2, 100, None),
    ]
    (table,) = seed_tables(read_runs(folders))
    pgd_10 = table.rows[0][5]
    assert (pgd_10.text, pgd_10.detail) == ("42.00", "\N{PLUS-MINUS SIGN} 2.83, n = 2")


def test_one_seed_twice_is_no_spread(tmp_path: Path) -> None:
    folders = [seeded(tmp_path / name, 0, 100, 0.4) for name in ("a", "b")]
    assert seed_tables(read_runs(folders)) == []


def test_the_first_run_of_each_seed_counts(tmp_path: Path) -> None:
    found = (("a", 0, 0.40), ("again", 0, 0.40), ("b", 1, 0.44))
    folders = [seeded(tmp_path / name, seed, 100, pgd_10) for name, seed, pgd_10 in found]
    (table,) = seed_tables(read_runs(folders))
    ((names, _, n, seeds, _, pgd_10, *_),) = table.rows
    assert (names.text, n.text, seeds.text) == ("a, b", "2", "0, 1")
    assert pgd_10.detail == "\N{PLUS-MINUS SIGN} 2.83"


def test_values_by_epoch_are_no_seed(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / name, seed, 100, 0.4) for seed, name in enumerate("ab")]
    by_epoch(runs[1], **{"0": "eps 0", "3": "eps 8/255"})
    assert seed_tables(read_runs(runs)) == []
