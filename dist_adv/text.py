"""Names and numbers as people read them."""

import difflib
from collections.abc import Sequence


def percent(fraction: float) -> str:
    """Return a fraction as a percentage without the sign: 0.4301 is 43.0."""
    return f"{100 * fraction:.1f}"


def percentage(fraction: float) -> str:
    """Return a fraction as a percentage with its sign, for prose."""
    return f"{percent(fraction)}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """Return a time in the unit in which it is easiest to grasp."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 20 else f"{seconds:.0f} s"
    if seconds < 120 * 60:
        return f"{seconds / 60:.1f} min" if seconds < 20 * 60 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def pixels(value: float) -> str:
    """Return a perturbation size: k/255 where that is what it is."""
    levels = round(255 * value)
    if value != round(value) and abs(value - levels / 255) < 1e-6:
        return f"{levels}/255"
    return f"{value:.3g}"


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of a list that may be long, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def shown(name: object) -> str:
    r"""Return a name as it can be printed: \xe9 for a byte that is no UTF-8, \n for a line end."""
    return "".join(each if each.isprintable() else _escaped(each) for each in str(name))


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # how Python keeps a byte of a file's name
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def nearest(word: str, known: Sequence[str]) -> str:
    """Return the end of a complaint about an unknown word: the one that was meant, or all."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(known)}"


def one_line(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())


def said(error: Exception) -> str:
    """Return an error's kind and text on one line, as somebody's own code raised it."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
