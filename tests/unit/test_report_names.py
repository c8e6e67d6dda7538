"""Names of classes and runs that are no plain words: shown as they are, or escaped."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, text

from dist_adv import cli
from dist_adv.report import write_report
from dist_adv.report.figures import album
from dist_adv.runs.run import Examples
from dist_adv.text import shown
from dist_adv.tracking.wandb_run import caption
from made_up_runs import add_examples, epoch, evaluation, make_run

pytestmark = pytest.mark.slow

LATIN_1 = os.fsdecode(b"caf\xe9")  # as the folder of a class is called on an old disk
ODD = [
    (LATIN_1, r"caf\xe9"),
    ("caf\u00e9", "caf\u00e9"),
    ("a\nb\tc", r"a\nb\tc"),
    ("\ud800", r"\ud800"),
    ("\u202egnp", r"\u202egnp"),  # would turn what follows
    ("\u732b", "\u732b"),
    ("$a_1$ <b>&amp;|*", "$a_1$ <b>&amp;|*"),
]


@pytest.mark.parametrize(("name", "said"), ODD)
def test_shown(name: str, said: str) -> None:
    assert shown(name) == said
    assert shown(name).encode()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Everything that is written in a picture; a character that no font has is an error."""
    found: set[str] = set()
    draw = text.Text.draw

    def see(self: text.Text, renderer: object) -> None:
        found.add(self.get_text())
        draw(self, renderer)  # type: ignore[arg-type]

    monkeypatch.setattr(text.Text, "draw", see)
    monkeypatch.setattr(album, "_DPI", 40)  # it is read what is written, and not looked at
    return found


@pytest.fixture(autouse=True)
def no_boxes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")
        yield


@pytest.fixture(autouse=True)
def own_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fonts that come with matplotlib, whatever this machine has."""
    path = Path(font_manager.__file__).parent / "mpl-data"
    fonts = font_manager.fontManager.ttflist
    mine = [font for font in fonts if Path(font.fname).is_relative_to(path)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", mine)


def reported(tmp_path: Path, classes: list[str], name: str = "run") -> str:
    """A report on a run with these three classes; the page, which holds as much as the Markdown."""
    lines = [epoch(1, 30.0), epoch(2, 60.0)]
    results = [evaluation("natural", 0.9), evaluation("pgd-10", 0.4)]
    run = make_run(tmp_path / name, metrics=lines, results=results)
    env = json.loads((run / "env.json").read_text())
    env["dataset"]["classes"] = classes
    (run / "env.json").write_text(json.dumps(env))
    add_examples(run, channels=3, size=8, classes=classes)
    other = make_run(tmp_path / "other", metrics=lines, results=results)
    page = write_report([run, other], tmp_path / "out")
    assert (tmp_path / "out/report.md").read_text(encoding="utf-8")
    return page.read_text(encoding="utf-8")


def test_a_class_whose_name_is_no_utf_8(tmp_path: Path, drawn: set[str]) -> None:
    page = reported(tmp_path, [LATIN_1, "a\nb", "c"])
    assert r"3 classes (caf\xe9, a\nb, c)" in page
    assert any(said.startswith("caf\\xe9\n") for said in drawn)  # below its image


def test_a_run_whose_name_is_no_utf_8(
    tmp_path: Path, drawn: set[str], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """On the page, in the pictures, in results.csv, and on the terminal."""
    try:
        page = reported(tmp_path, ["a", "b", "c"], LATIN_1)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert r"<td>caf\xe9</td>" in page.replace("\n", "")
    assert any("caf\\xe9" in said for said in drawn)
    table = (tmp_path / "out/results.csv").read_text(encoding="utf-8")
    assert r"caf\xe9" in table
    monkeypatch.setenv("PATH", "")
    assert cli._run(["status", str(tmp_path / LATIN_1)]) == 0
    assert capsys.readouterr().out.encode()


def test_characters_that_no_font_has_are_escaped(tmp_path: Path, drawn: set[str]) -> None:
    page = reported(tmp_path, ["\u732b", "\U0001f415 dog", "caf\u00e9"], "\u5b9f\u9a13")
    assert "\u732b" in page  # a browser has fonts for it
    assert any(said.startswith("\\u732b\n") for said in drawn)
    assert any("caf\u00e9" in said for said in drawn)
    assert any("\\u5b9f\\u9a13" in said for said in drawn)


def test_a_font_that_has_them_is_used(tmp_path: Path, drawn: set[str]) -> None:
    """One made here, of a single character."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (900, 700), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({0x732B: "cat"})
    font.setupGlyf({".notdef": pen.glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 100), "cat": (1000, 100)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "One Cat", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "cat.ttf")
    font_manager.fontManager.addfont(tmp_path / "cat.ttf")
    reported(tmp_path, ["\u732b", "\u72ac", "c"])
    assert any(said.startswith("\u732b\n") for said in drawn)
    assert any("\\u72ac" in said for said in drawn)


def test_names_with_marks_of_other_languages(tmp_path: Path, drawn: set[str]) -> None:
    """No formula in pictures, no tags on the page, no emphasis in Markdown; all in legends."""
    name = "_$a_1$ <b>[x](y)&amp;*c*"
    page = reported(tmp_path, ["$x^2$", "<i>", "a|b"], name)
    assert "&lt;b&gt;[x](y)&amp;amp;*c*" in page
    assert f" {name}" in drawn  # a legend leaves out what begins with an underscore
    assert any(said.startswith("$x^2$\n") for said in drawn)
    markdown = (tmp_path / "out/report.md").read_text()
    assert r"_\$a_1\$ \<b>\[x\](y)\&amp;\*c\*" in markdown
    assert r"($x^2$" not in markdown


def test_a_very_long_name(tmp_path: Path, drawn: set[str]) -> None:
    """Of a class below its image, of a run in a legend and in a file's name."""
    reported(tmp_path, ["c" * 300, "\u00fc" * 300, "c"], "r" * 250)
    assert max(max(map(len, said.splitlines()), default=0) for said in drawn) < 150
    assert any(said.startswith("c" * 14 + "\N{HORIZONTAL ELLIPSIS}\n") for said in drawn)


def test_the_caption_on_a_dashboard(tmp_path: Path) -> None:
    import numpy as np

    one = np.zeros(1, dtype=int)
    image = np.zeros((1, 1, 2, 2))
    said = caption(Examples("pgd-10", [LATIN_1], image, image, one, one, one))
    assert said.encode()
    assert r"caf\xe9: caf\xe9 > caf\xe9" in said
