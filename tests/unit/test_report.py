"""The report, from run folders made up here: what it shows, what it refuses, what it writes."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dist_adv.errors import UserError
from dist_adv.report import write_report
from dist_adv.report.tables import attack_order
from dist_adv.report.text import headline, notices
from dist_adv.runs.run import read_runs, strongest_attack
from dist_adv.text import duration, pixels
from made_up_runs import PLANNED, add_examples, epoch, evaluation, make_run

# The report that many tests share is drawn all the same, as it is made before.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

FLAG = "FGSM leaves 61.0% and pgd-10 0.4%: the sign of catastrophic overfitting"


@dataclass(frozen=True)
class Report:
    out: Path
    html: str
    markdown: str
    rows: list[dict[str, str]]

    def row(self, run: str, attack: str) -> dict[str, str]:
        (found,) = (row for row in self.rows if (row["run"], row["attack"]) == (run, attack))
        return found


def report_on(runs: list[Path], out: Path, against: Sequence[str] = ()) -> Report:
    page = write_report(runs, out, against)
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Report(out, page.read_text(), (out / "report.md").read_text(), rows)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Four runs: natural; two named `fast`, one of them collapsed; Free, unfinished."""
    root = tmp_path_factory.mktemp("runs")
    natural = make_run(
        root / "natural", results=[evaluation("natural", 0.95), evaluation("pgd-10", 0.0)]
    )
    add_examples(natural, channels=1, size=8)
    good = make_run(
        root / "a" / "fast",
        {"name": "fast", "alpha": 10 / 255, "init": "random", "guard": "warn"},
        results=[
            evaluation("natural", 0.847),
            evaluation("pgd-10", 0.9),  # superseded by the last line
            evaluation("pgd-50-10", 0.41),
            evaluation("pgd-10", 0.43),
        ],
    )
    add_examples(good, channels=3, size=32)
    collapsed = make_run(
        root / "b" / "fast",
        {"name": "fast", "alpha": 0.0123, "init": "zero", "guard": "stop"},
        metrics=[epoch(1, 30.0), epoch(2, 60.0), epoch(3, 90.0, guard_tripped=True)],
        results=[evaluation("natural", 0.87), evaluation("pgd-10", 0.004, flags=[FLAG])],
    )
    unfinished = make_run(
        root / "free",
        {"name": "free", "replays": 8},
        metrics=[
            epoch(1, 30.0),
            epoch(2, 61.0),
            epoch(3, 92.0),
            # Killed, and resumed from the checkpoint of the first epoch.
            epoch(2, 50.0),
            {"kind": "train", "epoch": 2.5, "step": 25, "seconds": 62.5},
        ],
        finished=False,
    )
    return report_on([natural, good, collapsed, unfinished], tmp_path_factory.mktemp("out"))


def test_csv_holds_the_recorded_numbers(report: Report) -> None:
    assert len(report.rows) == 7
    row = report.row("a/fast", "pgd-10")
    assert float(row["accuracy"]) == 0.43
    assert float(row["ci95_low"]) == pytest.approx(0.3997, abs=1e-4)
    assert (row["method"], float(row["method_alpha"])) == ("fast", 10 / 255)
    assert (row["attack_steps"], row["attack_restarts"], row["n"]) == ("10", "1", "1000")
    assert (row["epochs"], row["optimiser_steps"]) == ("4.0", "40")
    assert (float(row["training_seconds"]), float(row["epoch_seconds"])) == (120.0, 30.0)
    assert (row["ranks"], row["precision"], row["seed"]) == ("2", "bf16", "7")
    assert report.row("b/fast", "pgd-10")["flags"] == FLAG
    assert report.row("natural", "natural")["attack_steps"] == ""


def test_main_table(report: Report) -> None:
    header, _, natural, good, collapsed, unfinished = markdown_table(report, "Results")
    assert header[:6] == ["Run", "Method", "Natural", "PGD-10", "PGD-50-10", "Epochs"]
    assert natural[:5] == [
        "natural",
        "Natural",
        "95.0 (93.5\N{EN DASH}96.2)",
        "0.0 (0.0\N{EN DASH}0.4)",
        "-",
    ]
    assert good[:2] == ["a/fast", "Fast (alpha 10/255, init random)"]
    assert good[3] == "**43.0** (40.0\N{EN DASH}46.1)"
    assert good[4].startswith("41.0")  # nothing to be better than
    assert good[5:] == ["4", "40", "2.0 min", "30 s"]
    assert collapsed[:2] == ["b/fast", "Fast (alpha 0.0123, init zero, guard stop)"]
    assert collapsed[3].endswith("(warning)")
    assert collapsed[5] == "3 of 4"
    assert unfinished[:2] == ["free (unfinished)", "Free (m = 8)"]
    assert unfinished[5:] == ["2.5 of 4", "25", "62 s", "25 s"]


def test_networks_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for kind in ({}, {"shortcut": "raw"}, {"shortcut": "raw", "final_norm": False}):
        folder = make_run(tmp_path / ("-".join(kind) or "usual"))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["model"] |= kind
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    page = report_on(list(tmp_path.iterdir()), tmp_path / "out").markdown
    for about in ("(width 16)", "(width 16, raw)", "(width 16, raw, no final norm)"):
        assert f"preact_resnet18 {about}" in page


def test_what_is_alike_in_all_runs_is_said_once(report: Report, tmp_path: Path) -> None:
    assert (
        "Alike in all runs: model preact_resnet18 (width 16), batch size 128, ranks 2, precision "
        "bf16, seed 7."
    ) in report.markdown
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=8)]
    header, _, *rows = markdown_table(report_on(runs, tmp_path / "out"), "Results")
    assert (header[-1], rows[0][-1], rows[1][-1]) == ("Seed", "7", "8")


def test_what_is_added_to_a_method_is_said(tmp_path: Path) -> None:
    """It is no option of the method's, and costs and changes as much."""
    runs = [make_run(tmp_path / name) for name in ("alone", "with", "also")]
    for run, added in (
        (runs[1], {"average": {"epochs": 4.0}, "awp": {"gamma": 0.01, "start": 0.0}}),
        (
            runs[2],
            {
                "optim": {"name": "adamw"},
                "threat": {"warmup": 5.0},
                "data": {"extra": {"path": "edm.npz", "fraction": 0.7}, "cutmix": 1.0},
                "train": {"start": "natural"},
            },
        ),
    ):
        config = yaml.safe_load((run / "config.yaml").read_text())
        for section, keys in added.items():
            config[section] = config.get(section, {}) | keys
        config["train"]["label_smoothing"] = 0.1
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    header, _, *rows = markdown_table(report_on(runs, tmp_path / "a"), "Results")
    assert {row[0]: row[header.index("With")] for row in rows} == {
        "alone": "-",
        "with": "average of 4 epochs, AWP 0.01, label smoothing 0.1",
        "also": "label smoothing 0.1, eps warm-up of 5 epochs, AdamW, weights of natural, "
        "70% generated images, CutMix",
    }
    same = report_on([shutil.copytree(runs[1], tmp_path / "same"), runs[1]], tmp_path / "b")
    assert "Alike in all runs: with average of 4 epochs, AWP 0.01, label" in same.markdown


def test_folders_of_images_are_told_apart(tmp_path: Path) -> None:
    """They share a name; what was measured on one says nothing on another."""
    runs = [make_run(tmp_path / name) for name in ("a", "b", "c")]
    for run, classes in zip(runs, (["cat", "dog"], ["cat", "dog"], ["x", "y", "z"]), strict=True):
        env = json.loads((run / "env.json").read_text())
        env["dataset"]["classes"] = classes
        (run / "env.json").write_text(json.dumps(env))
    said = report_on(runs, tmp_path / "out").markdown
    assert "2 classes (cat, dog)." in said
    assert "3 classes (x, y, z)." in said
    assert (
        "different data sets, digits (2 classes, 360 test images) and "
        "digits (3 classes, 360 test images)"
    ) in said
    assert "different data sets" not in report_on(runs[:2], tmp_path / "two").markdown


def test_methods_are_explained(report: Report) -> None:
    """What a batch costs by each method that there is a run of."""
    assert [[row[0], *row[2:]] for row in markdown_table(report, "The methods")[2:]] == [
        ["Natural", "1", "1"],
        ["Fast", "1", "1.67"],
        ["Free", "8", "8"],
    ]
    assert "Data: digits, 1,437 training images, 360 test images, 8 x 8 pixels." in report.markdown


def test_page_shows_what_the_markdown_shows(report: Report) -> None:
    assert "<strong>43.0</strong><small>40.0\N{EN DASH}46.1</small>" in report.html
    assert "<small>unfinished</small>" in report.html
    assert report.html.count("This evaluation carries a warning") == 1
    assert '<td class="number" data-value="120.0">2.0 min</td>' in report.html  # what it sorts by
    assert report.html.count('<table data-of="runs">') == 2  # the others' rows are none
    assert '<td class="number" data-value="1437">1,437</td>' in report.html
    for row in markdown_table(report, "Attack settings")[2:]:
        assert f"<td>{row[0]}</td>" in report.html.replace("\n", "")


def test_warnings_come_before_the_numbers(report: Report) -> None:
    for text in (report.html, report.markdown):
        above = text[: text.index("Attack settings")].split("Results")[0]
        assert f"b/fast, PGD-10: {FLAG}" in above
        assert "free is unfinished: 2.5 of 4 epochs are logged." in above
        assert "b/fast: the guard against catastrophic overfitting tripped in epoch 3" in above


def test_headline(report: Report) -> None:
    said = report.markdown.splitlines()[2].replace("\N{NO-BREAK SPACE}", " ")
    assert said == (
        "Under PGD-10 (1,000 images), the strongest attack that all evaluated runs share, a/fast "
        "(Fast, alpha 10/255, init random) has the best accuracy: 43.0 % (40.0\N{EN DASH}46.1); "
        "natural training (natural) has 0.0 %. Training took from 90 s (b/fast) to 2.0 min "
        "(natural)."
    )


def test_attack_settings_are_stated(report: Report) -> None:
    rows = markdown_table(report, "Attack settings")
    assert [row[0] for row in rows[2:]] == ["Natural", "PGD-10", "PGD-50-10"]
    assert rows[3][1:10] == ["linf", "8/255", "10", "2/255", "1", "random", "ce", "last", "1,000"]
    assert (rows[3][-1], rows[4][-1]) == ("all", "a/fast")


def test_environment_is_stated(report: Report) -> None:
    rows = markdown_table(report, "Hardware, data and versions")
    assert "0123456789ab-dirty" in rows[2]
    assert rows[2][1:8] == ["cpu", "Some CPU", "2", "2", "digits", "1,437", "360"]


def test_figures_are_there_and_not_blank(report: Report) -> None:
    linked = re.findall(r"\]\((figures/[^)]+)\)", report.markdown)
    on_disk = sorted(f"figures/{path.name}" for path in (report.out / "figures").iterdir())
    # Four of all runs, curves of each run, examples of two.
    assert len(linked) == 4 + 4 + 2
    assert sorted(linked) == on_disk
    assert report.html.count("data:image/png;base64,") == len(linked)
    for name in linked:
        with Image.open(report.out / name) as image:
            pixels_of = np.asarray(image.convert("RGB"), dtype=float)
        height, width, _ = pixels_of.shape
        assert 600 <= height <= 1200, name
        assert 700 <= width <= 2000, name
        assert pixels_of.std() > 10, name


def test_examples_mark_right_and_wrong(report: Report) -> None:
    (path,) = (report.out / "figures").glob("*examples-natural.png")
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert {(0x00, 0x70, 0x4F), (0xB8, 0x43, 0x00)} <= colours


def test_page_needs_nothing_from_outside(report: Report) -> None:
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]{0,30})""", report.html)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"<script[^>]|<link|@import|url\(|fetch|import\(", report.html)


def test_torn_last_line_is_ignored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "epoch": 4.5, "note": "\xc3')
    (read,) = read_runs([run])
    assert read.epochs_done == 4


def test_damage_elsewhere_is_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not valid JSON"):
        read_runs([run])


def test_resumed_run_counts_no_stretch_twice(tmp_path: Path) -> None:
    before = [epoch(1, 30.0), epoch(2, 60.0), epoch(3, 90.0)]
    run = make_run(tmp_path / "run", metrics=[*before, epoch(2, 70.0)])
    (read,) = read_runs([run])
    assert [record["seconds"] for record in read.epochs] == [30.0, 70.0]
    assert (read.epochs_done, read.seconds) == (2, 70.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "missing, so this is not a run folder"),
        ("config.yaml", "method: [", "not valid YAML"),
        ("config.yaml", "method: {name: fast}", "threat is missing"),
        ("config.yaml", "", "no mapping of keys"),
        ("env.json", "{", "not valid JSON"),
        ("env.json", "[]", "not a JSON object"),
        ("metrics.jsonl", '{"kind": "epoch", "epoch": 1}', "line 1 lacks step, seconds"),
        ("metrics.jsonl", '{"epoch": 1}', "line 1 is of unknown kind None"),
        ("results.jsonl", '{"attack": "pgd-10"}', "line 1 lacks accuracy, ci95, n"),
        ("results.jsonl", "3", "line 1 is not a JSON object"),
        ("examples.safetensors", "nonsense", "not readable as example images"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    run = make_run(tmp_path / "run")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises(UserError) as caught:
        write_report([run], tmp_path / "out")
    text = str(caught.value)
    assert text.startswith(f"{run.resolve() / name}: ")
    assert message in text
    assert "\n" not in text
    assert not (tmp_path / "out").exists()


def test_missing_folder_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such run folder"):
        write_report([tmp_path / "nothing"], tmp_path / "out")
    with pytest.raises(UserError, match="no runs given"):
        write_report([], tmp_path / "out")


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"cannot be written \(File exists\); name another"):
        write_report([make_run(tmp_path / "run")], tmp_path / "out")


def test_bare_run_and_replaced_report(tmp_path: Path) -> None:
    """A run that has logged nothing yet is reported, and nothing of an earlier report stays."""
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "007-curves-gone.png").touch()
    (out / "report.md").write_text("# Adversarial training report\n\nOf other runs.\n")
    (out / "figures" / "mine.png").touch()
    run = make_run(tmp_path / "run", metrics=[], finished=False)
    (run / "metrics.jsonl").unlink()
    (run / "results.jsonl").unlink()
    report = report_on([run], out)
    assert "None of these runs has been evaluated" in report.html
    assert "run is unfinished: 0 of 4 epochs are logged." in report.html
    assert "Neither curves nor example images are recorded." in report.html
    assert report.rows == []
    assert [path.name for path in (out / "figures").iterdir()] == ["mine.png"]


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>$x$|y", results=[evaluation("natural", 0.9)])
    report = report_on([run], tmp_path / "out")
    assert "<td>&lt;b&gt;$x$|y</td>" in report.html.replace("\n", "")
    assert markdown_table(report, "Results")[2][0] == r"\<b>\$x\$\|y"


@pytest.mark.parametrize(("split", "said"), [("test", "test"), ("held-out", "held-out")])
def test_curves_say_which_images_they_are_of(split: str, said: str, tmp_path: Path) -> None:
    lines = [epoch(number, 30.0 * number, curve_split=split) for number in range(1, PLANNED + 1)]
    run = make_run(tmp_path / "run", metrics=lines, results=[evaluation("natural", 0.9)])
    report = report_on([run], tmp_path / "out")
    assert f"The curves use 100 {said} images" in " ".join(report.html.split())
    assert f"natural {said} images (left)" in " ".join(report.html.split())


def test_same_folder_twice_is_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert [each.label for each in read_runs([run, run / ".." / "run"])] == ["run"]


def test_strongest_attack_is_the_most_shared(tmp_path: Path) -> None:
    shared = [evaluation("natural", 0.9), evaluation("pgd-10", 0.5), evaluation("pgd-20", 0.4)]
    runs = read_runs(
        [
            make_run(tmp_path / "a", results=shared),
            make_run(tmp_path / "b", results=[*shared, evaluation("pgd-50", 0.1)]),
        ]
    )
    assert strongest_attack(runs) == "pgd-20"


def test_headline_claims_no_order_within_the_intervals(tmp_path: Path) -> None:
    runs = read_runs(
        [
            make_run(tmp_path / name, {"name": "pgd"}, results=[evaluation("pgd-10", accuracy)])
            for name, accuracy in (("a", 0.43), ("b", 0.44), ("c", 0.30))
        ]
    )
    said = headline(runs)[0]
    assert "b (PGD, K = 7, alpha 2/255, init random) has the best accuracy" in said
    assert said.endswith("Its interval overlaps with that of a, so their order is open.")


def test_headline_of_one_run(tmp_path: Path) -> None:
    results = [evaluation("natural", 0.8), evaluation("pgd-10", 0.5)]
    (sentence, time) = headline(read_runs([make_run(tmp_path / "a", results=results)]))
    assert sentence.replace("\N{NO-BREAK SPACE}", " ") == (
        "a (Natural) classifies 80.0 % of the natural test images and 50.0 % "
        "(46.9\N{EN DASH}53.1) of the test images under PGD-10 (1,000 images)."
    )
    assert time == "Training took 2.0 min."


def test_what_does_not_compare_is_said(tmp_path: Path) -> None:
    runs = read_runs(
        [
            make_run(tmp_path / "a", results=[evaluation("pgd-10", 0.5, seed=0)]),
            make_run(tmp_path / "b", results=[evaluation("pgd-10", 0.5, n=500, seed=1)]),
            make_run(tmp_path / "c", eps=4 / 255, results=[evaluation("natural", 0.5)]),
        ]
    )
    assert headline(runs)[0] == (
        "The runs have different threat models, eps 4/255 (linf) and eps 8/255 (linf): "
        "their accuracies do not compare."
    )
    assert not any("best accuracy" in sentence for sentence in headline(runs))
    assert notices(runs) == [
        "PGD-10 was not run alike on all runs (differing: images): see the attack settings "
        "before comparing.",
    ]
    assert notices(runs[:1]) == []


def judged(folder: Path, pgd: float, autoattack: float | None, **settings: object) -> Path:
    """A run under PGD-50 from ten starts and, with these settings, AutoAttack."""
    lines = [evaluation("natural", 0.9), evaluation("pgd-50-10", pgd)]
    if autoattack is not None:
        lines.append(evaluation("autoattack", autoattack, **settings))
    return make_run(folder, results=lines)


def test_what_autoattack_has_judged_comes_first_with_its_gap(tmp_path: Path) -> None:
    """In the order given otherwise; figures of other images have no gap."""
    runs = [
        judged(tmp_path / "a", 0.55, None),
        judged(tmp_path / "b", 0.50, 0.474),
        judged(tmp_path / "c", 0.60, 0.30),
        judged(tmp_path / "few", 0.50, 0.47, n=500),
        judged(tmp_path / "held", 0.50, 0.47, split="held-out"),
        judged(tmp_path / "lucky", 0.40, 0.401),
        judged(tmp_path / "z", 0.65, None),
    ]
    report = report_on(runs, tmp_path / "out")
    header, _, *rows = markdown_table(report, "Results")
    assert header[:6] == ["Run", "Method", "Natural", "PGD-50-10", "AutoAttack", "Gap to PGD-50-10"]
    assert {row[0]: row[5] for row in rows} == {
        **{"b": "2.6", "c": "30.0", "few": "-", "held": "-", "lucky": "\N{MINUS SIGN}0.1"},
        **{"a": "-", "z": "-"},
    }
    assert [row[0] for row in rows] == ["b", "c", "few", "held", "lucky", "a", "z"]
    assert "Runs that AutoAttack has judged come first." in report.markdown
    assert "AutoAttack tries four attacks" in report.markdown
    assert (
        "AutoAttack lies from \N{MINUS SIGN}0.1 points (lucky) to 30.0 points (c) below PGD-50-10 "
        "on the same images."
    ) in report.markdown.splitlines()[2]


def test_one_run_that_autoattack_has_judged(tmp_path: Path) -> None:
    report = report_on([judged(tmp_path / "a", 0.5, 0.47)], tmp_path / "out")
    assert "AutoAttack lies 3.0 points (a) below PGD-50-10 on the same" in report.markdown
    assert "come first" not in report.markdown


def test_what_apgd_t_is_stands_beside_its_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", results=[evaluation("natural", 0.9), evaluation("apgd-t", 0.4)])
    report = report_on([run], tmp_path / "out")
    header, *_ = markdown_table(report, "Results")
    assert header[:4] == ["Run", "Method", "Natural", "APGD-T"]
    assert "APGD-T is the strongest of AutoAttack's four by itself" in report.markdown
    assert "AutoAttack tries four attacks" not in report.markdown


def test_no_gap_without_figures_of_the_same_images(tmp_path: Path) -> None:
    for name, settings in (("never", {}), ("few", {"n": 500})):
        run = judged(tmp_path / name, 0.5, 0.47 if settings else None, **settings)
        report = report_on([run], tmp_path / "out" / name)
        header, *_ = markdown_table(report, "Results")
        assert not any("Gap" in title for title in header)
        assert "AutoAttack lies" not in report.markdown


def test_the_gap_is_to_the_pgd_50_that_most_runs_share(tmp_path: Path) -> None:
    """Of as many runs that of the most restarts; never to one of fewer steps."""
    strong = [evaluation(name, 0.5) for name in ("pgd-50", "pgd-50-10", "pgd-10-20")]
    runs = [
        make_run(tmp_path / name, results=[evaluation("autoattack", 0.45), *lines])
        for name, lines in (("a", strong), ("b", strong[:1]))
    ]
    for some, title in ((runs, "PGD-50"), (runs[:1], "PGD-50-10")):
        header, *_ = markdown_table(report_on(some, tmp_path / title), "Results")
        assert [name for name in header if "Gap" in name] == [f"Gap to {title}"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(8 / 255, "8/255"), (0.0313725, "8/255"), (0.3, "0.3"), (0.012345, "0.0123"), (1.0, "1")],
)
def test_pixels(value: float, text: str) -> None:
    assert pixels(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (95, "95 s"), (130, "2.2 min"), (5280, "88 min"), (7300, "2.0 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_attacks_are_in_a_readable_order() -> None:
    names = ["autoattack", "square", "pgd-50-10", "pgd-100", "pgd-50", "fgsm", "pgd-10", "natural"]
    assert sorted(names, key=attack_order) == [
        "natural",
        "fgsm",
        "pgd-10",
        "pgd-50",
        "pgd-50-10",
        "pgd-100",
        "square",
        "autoattack",
    ]


def test_needs_no_torch() -> None:
    code = "import sys, dist_adv.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def markdown_table(report: Report, title: str) -> list[list[str]]:
    """The cells of a table in report.md: header, rule, rows."""
    after = report.markdown.split(f"## {title}\n")[1]
    lines = after[after.index("|") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_figures_of_a_shorter_run_are_not_those_of_the_longer(tmp_path: Path) -> None:
    lines = [evaluation("pgd-50", 0.4, step=10), evaluation("natural", 0.9, step=20)]
    folder = make_run(tmp_path / "run", results=lines)
    assert list(read_runs([folder])[0].evaluations) == ["natural"]


def test_a_quick_look_does_not_replace_a_figure_on_more_images(tmp_path: Path) -> None:
    """`eval --limit` after a full evaluation; of two on as many images the last one counts."""
    results = [
        evaluation("pgd-10", 0.3, n=1000),
        evaluation("pgd-10", 0.5, n=1000),
        evaluation("pgd-10", 0.9, n=100),
    ]
    (run,) = read_runs([make_run(tmp_path / "run", results=results)])
    assert (run.evaluations["pgd-10"].n, run.evaluations["pgd-10"].accuracy) == (1000, 0.5)


def test_accuracies_of_0_and_1_whose_intervals_end_an_ulp_beyond(tmp_path):
    nothing = evaluation("pgd-10", 0.0, n=6, ci95=[5e-17, 0.4])
    everything = evaluation("natural", 1.0, n=6, ci95=[0.6, 1 - 1e-16])
    run = make_run(tmp_path / "run", results=[everything, nothing])
    assert write_report([run], tmp_path / "report").exists()
