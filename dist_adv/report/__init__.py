"""Turn run folders into a report: one HTML page, the same in Markdown, a CSV file and PNG files."""

import base64
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from dist_adv import packages
from dist_adv.errors import UserError, unwritable
from dist_adv.report.against import against_table, set_beside, write_against
from dist_adv.report.csvfile import write_csv
from dist_adv.report.networks import compare, comparison_tables
from dist_adv.report.primer import explanation, methods
from dist_adv.report.published import load_published
from dist_adv.report.seeds import seed_tables
from dist_adv.report.tables import Cell, Column, reference, results
from dist_adv.report.text import headline, notices
from dist_adv.runs.run import read_runs

__all__ = ["write_report"]

log = logging.getLogger("dist_adv")

_TITLE = "# Adversarial training report"
_FILES = ("report.md", "report.html", "results.csv", "against.csv")


def write_report(runs: Sequence[Path], out: Path, against: Sequence[str] = ()) -> Path:
    """Report on the run folders `runs` in the folder `out`; return the path of report.html.

    `against` names publications of published.yaml whose figures are set beside those of the runs.
    `out` is created if need be, and an earlier report in it is replaced. Other files in it stay;
    UserError is raised where they have the names of a report's. The page holds its images itself;
    report.md refers to the files in figures/. Only where finished runs of several methods compare
    does it take time, and torch: their networks are looked at.
    """
    # Others take words and numbers from this package: matplotlib is for those who draw.
    packages.need("matplotlib", "report", "matplotlib")
    from dist_adv.report.figures import draw

    sources = load_published(against)
    read = read_runs(runs)
    pairs = {name: set_beside(read, source) for name, source in sources.items()}
    _check_out(out)
    comparison, uncompared = compare(read)
    if uncompared:
        log.warning("%s", uncompared)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # First of all, so that the rest is known for a report's by whoever writes it again.
        (out / "report.md").write_text(f"{_TITLE}\n\nBeing written.\n")
        content = {
            "headline": headline(read),
            "explanation": explanation(read),
            "methods": methods(read),
            "notices": [*notices(read), *([uncompared] if uncompared else [])],
            "tables": [
                results(read),
                *seed_tables(read),
                *(against_table(source, pairs[name]) for name, source in sources.items()),
                *(comparison_tables(comparison) if comparison else ()),
            ],
            "chapters": draw(read, comparison, out / "figures"),
            "reference": reference(read),
        }
        write_csv(read, out / "results.csv")
        if pairs:
            write_against(pairs, out / "against.csv")
        else:
            (out / "against.csv").unlink(missing_ok=True)  # of an earlier report
        templates = _templates()
        for name in ("report.md", "report.html"):
            text = templates.get_template(f"{name}.j2").render(content)
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(out, error, "name another folder") from error
    return out / "report.html"


def _check_out(out: Path) -> None:
    """Raise UserError where the files of a report would replace others that are none of one."""
    try:
        found = [out / name for name in _FILES if (out / name).exists()]
        found = [path for path in found if not path.is_file() or path.stat().st_size]
        found += sorted((out / "figures").glob("[0-9][0-9][0-9]-*.png"))
        if not found:
            return
        page = out / "report.md"
        with page.open("rb") as file:
            if file.read(len(_TITLE)) == _TITLE.encode():
                return
    except FileNotFoundError:
        pass
    except OSError as error:
        raise unwritable(out, error, "name another folder") from error
    raise UserError(
        f"{out}: {found[0].relative_to(out)} is there, of no earlier report, and is not "
        f"overwritten; name another --out"
    )


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    environment.filters["markdown"] = _escape_markdown
    environment.filters["sorted_by"] = _sorted_by
    return environment


def _escape_markdown(text: str) -> str:
    """Let names such as `a|b` stand for themselves in Markdown."""
    for character in "\\`*|<[]$&~":
        text = text.replace(character, f"\\{character}")
    return text


def _sorted_by(cell: Cell, column: Column) -> float | str | None:
    """Return the number by which the page sorts a cell, as a script reads it: 1,437 is 1437.

    As a rule its text begins with it. None where there is no number, or none in the column.
    """
    if cell.value is not None or not column.numeric:
        return cell.value
    match = re.match(r"-?[\d,]*\.?\d+(e[+-]?\d+)?", cell.text)
    return match[0].replace(",", "") if match else None
