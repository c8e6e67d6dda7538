"""Names in pictures: in a font that has their characters, or else with escapes for them."""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib import font_manager
from rich.cells import cell_len, set_cell_size

from dist_adv.report.networks import Comparison
from dist_adv.runs.run import Examples, Run
from dist_adv.text import shown

FONT = "DejaVu Sans"  # comes with matplotlib
_LAST_RESORT = "Last Resort"  # also; draws a box for every character that there is
_LONGEST_LABEL = 40
_LONGEST_CLASS = 15


class Lettering:
    """How the names of runs and classes are written; `families` are for `font.family`."""

    def __init__(self, runs: Sequence[Run]) -> None:
        names = [run.label for run in runs]
        names += [name for run in runs if run.examples for name in run.examples.classes]
        self.families, self.missing = _fonts_for(set("".join(map(shown, names))))

    def run(self, run: Run) -> Run:
        label = _short(self._written(run.label), _LONGEST_LABEL)
        # matplotlib leaves what begins with an underscore out of legends.
        label = f" {label}" if label.startswith("_") else label
        return replace(run, label=label, examples=run.examples and self._examples(run.examples))

    def comparison(self, comparison: Comparison) -> Comparison:
        return replace(
            comparison,
            runs=[self.run(run) for run in comparison.runs],
            examples=self._examples(comparison.examples),
        )

    def _examples(self, examples: Examples) -> Examples:
        classes = [_short(self._written(name), _LONGEST_CLASS) for name in examples.classes]
        return replace(examples, classes=classes)

    def _written(self, name: str) -> str:
        return "".join(
            letter.encode("unicode_escape").decode() if letter in self.missing else letter
            for letter in shown(name)
        )


def _fonts_for(letters: set[str]) -> tuple[list[str], set[str]]:
    """Return families that have the letters between them, and the letters that none has."""
    families, missing = [FONT], letters - _letters_of(font_manager.findfont(FONT))
    upright = (font for font in font_manager.fontManager.ttflist if font.style == "normal")
    for font in sorted(upright, key=lambda font: font.name):
        if not missing:
            break
        if font.name in families or font.name.startswith(_LAST_RESORT):
            continue
        if found := missing & _letters_of(font.fname):
            families.append(font.name)
            missing -= found
    return families, missing


def _letters_of(path: str) -> set[str]:
    """Return the letters of a font file; none of one that matplotlib cannot draw with."""
    try:
        font = font_manager.get_font(path)
        return set(map(chr, font.get_charmap())) if font.scalable else set()
    except (OSError, RuntimeError):
        return set()


def _short(name: str, longest: int) -> str:
    """Cut a name to so many columns; a Chinese character takes two."""
    if cell_len(name) <= longest:
        return name
    return set_cell_size(name, longest - 1).rstrip() + "\N{HORIZONTAL ELLIPSIS}"
