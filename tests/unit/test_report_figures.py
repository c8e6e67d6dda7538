"""The report's figures: of runs on digits that are trained here, and of runs made up."""

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from dist_adv.config import parse_config
from dist_adv.report import write_report
from dist_adv.report.figures import album, replays
from dist_adv.report.figures.colours import COLOURS, give_looks
from dist_adv.runs.run import read_runs
from dist_adv.training.run import train_run
from made_up_runs import add_examples, epoch, evaluation, make_run

pytestmark = pytest.mark.slow
UNDRAWN = pytest.mark.usefixtures("undrawn")

RUNS: dict[str, tuple[dict[str, Any], int]] = {  # method, epochs
    "natural": ({"name": "natural"}, 2),
    "pgd": ({"name": "pgd", "steps": 2, "alpha": 0.1}, 2),
    "fast": ({"name": "fast", "alpha": 0.25, "guard": "warn"}, 2),
    "free-2": ({"name": "free", "replays": 2}, 2),
    "free-4": ({"name": "free", "replays": 4}, 2),
    "free-4-steps": ({"name": "free", "replays": 4}, 1),
}


def train(method: dict[str, Any], epochs: int, folder: Path) -> Path:
    tree = {
        "method": method,
        "threat": {"norm": "linf", "eps": 0.2},
        "model": {"name": "wide_resnet", "depth": 8, "widen": 1, "width": 4},
        "data": {"name": "digits"},
        "train": {"epochs": epochs, "batch_size": 256, "precision": "fp32", "threads": 1},
        "eval": {"attacks": ["natural", "fgsm", "pgd-3"], "limit": 60, "curve_limit": 60},
        "track": {"wandb": {"mode": "disabled"}},
    }
    train_run(parse_config(tree, "digits"), folder, "none")
    return folder


class Drawings(dict[str, Figure]):
    """Figures by the names of their files, without the number in front."""

    def __init__(self, out: Path) -> None:
        self.files = {path.stem[4:]: path for path in sorted((out / "figures").iterdir())}


def report_on(runs: list[Path], out: Path) -> Drawings:
    """Write the report and keep what it drew, as matplotlib has it."""
    figures = {}
    save = album._save

    def keep(figure: Figure, path: Path) -> None:
        figures[path.stem[4:]] = figure
        save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(album, "_save", keep)
        patch.setattr(album, "_DPI", 60)  # a third of the usual time
        write_report(runs, out)
    drawings = Drawings(out)
    drawings.update(figures)
    return drawings


@pytest.fixture(scope="module")
def digits_report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawings]:
    root = tmp_path_factory.mktemp("digits")
    runs = [train(method, epochs, root / name) for name, (method, epochs) in RUNS.items()]
    return report_on(runs, root / "report")


def test_every_figure_is_there(digits_report):
    alone = {f"{figure}-{run}" for run in RUNS for figure in ("curves", "examples")}
    together = {
        "accuracy-over-time",
        "accuracy-over-epochs",
        "trade-off",
        "replays",
        "catastrophic-overfitting",
        "loss-surfaces",
        "large-perturbations",
    }
    # After two epochs chance decides which runs are robust enough for the figure of costs.
    assert digits_report.keys() - {"cost"} == alone | together
    assert digits_report.keys() == digits_report.files.keys()


def test_none_is_blank(digits_report):
    for name, path in digits_report.files.items():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=float)
        assert pixels.std() > 10, name


def test_each_has_a_text_of_its_own(digits_report):
    """For those who do not see it: more than its title, and on the page as in Markdown."""
    folder = digits_report.files["trade-off"].parents[1]
    page, markdown = ((folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    texts = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(set(texts)) == len(digits_report.files)
    assert all(len(text.split()) > 8 for text in texts)
    linked = re.findall(r"!\[(.*)\]\(figures/", markdown)
    assert [re.sub(r"\\(.)", r"\1", text) for text in linked] == [unescape(t) for t in texts]


def test_axes_are_labelled_and_hold_data(digits_report):
    """An axis that is shared may leave its label to another that it is shared with."""
    for name, figure in digits_report.items():
        for axes in figure.axes:
            if axes.images:
                continue  # its row or its column is named, see below
            assert axes.lines, name
            assert all(len(line.get_xdata()) for line in axes.lines), name
            same_x = axes.get_shared_x_axes().get_siblings(axes)
            same_y = axes.get_shared_y_axes().get_siblings(axes)
            assert any(other.get_xlabel() for other in same_x), name
            assert any(other.get_ylabel() for other in same_y), name


def test_replays(digits_report):
    """Equal epochs and equal optimiser steps beside each other, with the runs' figures."""
    figure = digits_report["replays"]
    accuracies, times = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title() for axes in accuracies] == [
        "2 epochs each",
        "24 optimiser steps each",
    ]
    for axes in times:
        assert axes.lines[0].get_xdata().tolist() == [2, 4]
    assert legend(figure) == ["Natural", "FGSM", "PGD-3"]


@pytest.mark.parametrize(
    "other",
    [
        {"awp": {"gamma": 0.01}},
        {"average": {"epochs": 1}},
        {"label_smoothing": 0.1},
        {"precision": "fp32"},
        {},
    ],
)
def test_replays_of_other_experiments_are_no_series(other, tmp_path):
    settings = []
    for m, more in ((2, {}), (4, other)):
        folder = run(tmp_path, f"m{m}", "free", 0.4)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["method"]["replays"] = m
        (config["train"] if "label_smoothing" in more else config).update(more)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if "precision" in more:
            env = json.loads((folder / "env.json").read_text())
            (folder / "env.json").write_text(json.dumps(env | more))
        (read,) = read_runs([folder])
        settings.append(replays._settings(read))
    assert (settings[0] == settings[1]) == (not other)


def run(root: Path, name: str, method: str, robust: float, **more: Any) -> Path:
    """A run made up: its accuracies grow to `robust` under PGD."""
    results = [evaluation("natural", 1 - robust), evaluation("pgd-10", robust)]
    return make_run(root / name, {"name": method}, results=results, **more)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@UNDRAWN
def test_overlay_of_two_runs(tmp_path):
    """Natural accuracy on the left, PGD's on the right, both runs in both, each in its colour."""
    runs = [run(tmp_path, "a", "free", 0.4), run(tmp_path, "b", "fast", 0.5)]
    figure = report_on(runs, tmp_path / "out")["accuracy-over-epochs"]
    assert legend(figure) == ["a", "b"]
    curves = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert curves == [
        [pytest.approx([100 * epoch(k, 1.0)[key] for k in range(1, 5)])] * 2
        for key in ("test_accuracy", "pgd_accuracy")
    ]
    colours = [[line.get_color() for line in axes.lines] for axes in figure.axes]
    assert colours[0] == colours[1]
    assert len(set(colours[0])) == 2


def test_the_readers_own_style_changes_nothing(tmp_path):
    """A matplotlibrc may ask for LaTeX, which is not everywhere."""
    one = [run(tmp_path, "a", "free", 0.4)]
    plain = report_on(one, tmp_path / "plain").files
    with rc_context({"text.usetex": True, "axes.facecolor": "black", "savefig.transparent": True}):
        styled = report_on(one, tmp_path / "styled").files
    for name, path in plain.items():
        assert path.read_bytes() == styled[name].read_bytes()


@UNDRAWN
def test_overlay_of_many_runs_brings_out_the_best_of_each_method(tmp_path):
    accuracies = {"free": [0.3, 0.4, 0.35], "fast": [0.38, 0.2, 0.1, 0.3], "pgd": [0.45]}
    runs = [
        run(tmp_path, f"{method}-{i}", method, robust)
        for method, of_method in accuracies.items()
        for i, robust in enumerate(of_method)
    ]
    figure = report_on(runs, tmp_path / "out")["accuracy-over-time"]
    assert legend(figure) == ["free-1", "fast-0", "pgd-0"]
    assert [len(axes.lines) for axes in figure.axes] == [8, 8]


def collapsing(*robust: float) -> list[dict[str, Any]]:
    """FGSM keeps 45 %, training rises to 60 %, PGD goes through `robust`."""
    return [
        epoch(i, 30.0 * i, train_accuracy=0.15 * i, fgsm_accuracy=0.45, pgd_accuracy=accuracy)
        for i, accuracy in enumerate(robust, 1)
    ]


COLLAPSES = {  # a run's epochs, and the one in which it collapsed
    "half": (collapsing(0.40, 0.41, 0.20, 0.05), 3),  # below half of FGSM's 45 %, by 25 points
    "held": (collapsing(0.40, 0.24, 0.24, 0.24), None),  # half of it is left
    "back": (collapsing(0.40, 0.02, 0.40, 0.41), None),  # a bad epoch, not the end of the run
    "twice": (collapsing(0.40, 0.02, 0.40, 0.02), 4),
    "guard": ([epoch(1, 9.0), epoch(2, 18.0, guard_tripped=True)], 2),
    # FGSM tells nothing (it left little before, too), training accuracy does.
    "trained": (
        [
            epoch(i, 9.0 * i, fgsm_accuracy=0.18, pgd_accuracy=0.1 / i, train_accuracy=0.2 * i)
            for i in (1, 2, 3)
        ],
        2,
    ),
    # Few images, learnt by heart: on others it errs without an attack, too.
    "learnt": (
        [
            epoch(1, 9.0, train_accuracy=0.55, test_accuracy=0.21, fgsm_accuracy=0.13)
            | {"pgd_accuracy": 0.13}
        ],
        None,
    ),
    # Young, not collapsed: the shares say it, but there is little to lose yet.
    "young": ([epoch(1, 9.0, fgsm_accuracy=0.18, pgd_accuracy=0.03, train_accuracy=0.2)], None),
}


@UNDRAWN
def test_collapses_are_marked_where_they_begin(tmp_path):
    runs = [
        make_run(tmp_path / name, {"name": "fast"}, metrics)
        for name, (metrics, _) in COLLAPSES.items()
    ]
    natural = make_run(tmp_path / "natural", metrics=collapsing(0, 0, 0, 0))  # none by design
    figure = report_on([natural, *runs], tmp_path / "out")["catastrophic-overfitting"]
    titles = {
        name if collapse is None else f"{name}\ncollapsed in epoch {collapse}": collapse
        for name, (_, collapse) in COLLAPSES.items()
    }
    assert {axes.get_title() for axes in figure.axes} == titles.keys()
    for axes in figure.axes:
        collapse = titles[axes.get_title()]
        marks = [line.get_xdata()[0] for line in axes.lines[3:]]
        assert marks == ([] if collapse is None else [collapse])
        bottom, top = axes.get_ylim()
        assert all(bottom < y < top for line in axes.lines[:3] for y in line.get_ydata())
    said = (tmp_path / "out" / "report.md").read_text()
    assert "collapsed: half (from epoch 3 on; at the end 60.0" in said
    assert "held (from" not in said


@UNDRAWN
def test_names_in_the_trade_off_cover_neither_each_other_nor_points(tmp_path):
    """Fourteen runs, twelve of them close together."""
    runs = [run(tmp_path, "natural", "natural", 0.0), run(tmp_path, "fallen", "fast", 0.05)] + [
        run(tmp_path, f"free-{i}-some-name", "free", 0.40 + 0.004 * (i % 6)) for i in range(12)
    ]
    figure = report_on(runs, tmp_path / "out")["trade-off"]
    figure.draw_without_rendering()
    assert [len(axes.texts) for axes in figure.axes] == [2, 12]
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        inside = axes.get_window_extent()
        for i, box in enumerate(boxes):
            assert inside.contains(*box.min)
            assert inside.contains(*box.max)
            assert not any(box.overlaps(other) for other in boxes[:i])
            points = [axes.transData.transform(line.get_xydata()[0]) for line in axes.lines]
            assert not any(box.contains(*point) for point in points)


@UNDRAWN
def test_cost_is_epochs_of_natural_training_whatever_the_clock_says(tmp_path):
    """Four epochs each; the line goes by what is not surpassed for as little."""
    accuracies = {"fast": 0.3, "free": 0.25, "pgd": 0.4, "natural": 0.0, "trades": 0.35}
    runs = [run(tmp_path, name, name, robust) for name, robust in accuracies.items()]
    (axes,) = report_on(runs, tmp_path / "out")["cost"].axes
    line, *points = axes.lines
    costs = {"fast": 4 * 5 / 3, "free": 4 * 8, "pgd": 4 * 17 / 3, "trades": 4 * 9}
    places = {name: (cost, 100 * accuracies[name]) for name, cost in costs.items()}
    found = [tuple(each.get_xydata()[0]) for each in points]
    assert found == [pytest.approx(place) for place in places.values()]
    unbeaten = [tuple(each) for each in line.get_xydata()]
    assert unbeaten == [pytest.approx(places[name]) for name in ("fast", "pgd")]
    said = (tmp_path / "out" / "report.md").read_text()
    assert "The line begins at fast and ends at pgd." in said
    assert "Not shown: natural." in said


@UNDRAWN
def test_costs_that_are_not_known_or_all_the_same_are_not_drawn(tmp_path):
    same = [run(tmp_path, f"fast-{i}", "fast", 0.3 + 0.1 * i) for i in range(2)]
    assert "cost" not in report_on(same, tmp_path / "same")
    older = [run(tmp_path, name, name, 0.4) for name in ("free", "pgd")]
    (older[0] / "env.json").write_text("{}")
    assert "cost" not in report_on(older, tmp_path / "older")
    newer = [*older, run(tmp_path, "trades", "trades", 0.35)]
    report_on(newer, tmp_path / "newer")
    assert "Not shown: free." in (tmp_path / "newer" / "report.md").read_text()


@UNDRAWN
def test_a_run_looks_the_same_in_every_figure(tmp_path):
    runs = [run(tmp_path, f"run-{i}", method, 0.4) for i, method in enumerate(["free", "fast"] * 5)]
    figures = report_on(runs, tmp_path / "out")
    (shown,) = (
        line for line in figures["accuracy-over-time"].axes[0].lines if line.get_label() == "run-9"
    )
    curves = figures["curves-run-9"].axes[0].lines[1]
    assert (shown.get_color(), shown.get_marker()) == (curves.get_color(), curves.get_marker())
    looks = {
        (line.get_color(), line.get_marker())
        for i in range(10)
        for line in [figures[f"curves-run-{i}"].axes[0].lines[1]]
    }
    assert len(looks) == 10


@UNDRAWN
def test_examples_say_what_is_shown(tmp_path):
    """Rows are named, with the factor by which a perturbation is enlarged around grey."""
    folder = run(tmp_path, "a", "fast", 0.4)
    add_examples(folder, channels=3, size=32)
    figure = report_on([folder], tmp_path / "out")["examples-a"]
    named = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert [name.split("\n")[0] for name in named] == ["clean", "perturbation", "adversarial"]
    (factor,) = re.findall(r"\(amplified (\d+) times\)", named[1])
    images = [np.asarray(axes.images[0].get_array(), float) for axes in figure.axes]
    clean, change, adversarial = np.array(images).reshape(3, 3, 32, 32, 3)
    np.testing.assert_allclose(change, 0.5 + int(factor) * (adversarial - clean), atol=1e-5)
    assert change.std() > 0.3  # from nearly black to nearly white


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_examples_of_any_number_of_channels(channels, tmp_path):
    folder = run(tmp_path, "a", "fast", 0.4)
    add_examples(folder, channels=channels, size=8)
    assert "examples-a" in report_on([folder], tmp_path / "out")


@pytest.mark.parametrize("natural", [False, True])
def test_looks_of_many_methods(natural: bool, tmp_path: Path) -> None:
    """Seven have a colour each, and of more no two runs look the same."""
    names = ["consistency", "consistency", "fast", "n-fgsm", "nuat", "pgd", "trades", "mart"]
    names += ["gat", "sora", "natural"] if natural else []
    runs = [make_run(tmp_path / str(at), {"name": name}) for at, name in enumerate(names)]
    drawn = give_looks(read_runs(runs))
    colours = {each.run.config["method"]["name"]: each.colour for each in drawn}
    assert len(set(colours.values())) == len(COLOURS)
    assert (colours["fast"], colours["pgd"]) == (COLOURS[1], COLOURS[3])
    assert len({(each.colour, each.marker) for each in drawn}) == len(drawn)
