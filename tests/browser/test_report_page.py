"""The report's page in a browser: what it loads, how it looks, what its tables do."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from dist_adv.report import write_report
from made_up_runs import add_examples, epoch, evaluation, make_run

pytestmark = pytest.mark.slow

MARKUP = "<img src=x onerror=document.title='ran'>"
LONG = "a_run_with_a_name_" * 8  # nowhere to break
FLAG = "FGSM leaves 61.0% and pgd-10 0.4%: the sign of catastrophic overfitting"
SECONDS = {"natural": 45.0, "pgd": 7000.0, "free-4": 130.0}  # 45 s, 1.9 h, 2.2 min


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of nine runs, two of them judged by AutoAttack, with a table of every size."""
    root = tmp_path_factory.mktemp("runs")

    def run(
        name: str, method: dict[str, object], pgd: float, *more: object, **rest: object
    ) -> Path:
        metrics = [epoch(number, SECONDS.get(name, 60.0) / 4 * number) for number in (1, 2, 3, 4)]
        results = [evaluation("natural", 0.9), evaluation("pgd-50-10", pgd), *more]
        return make_run(root / name, method, **{"metrics": metrics, "results": results} | rest)

    runs = [
        run("natural", {"name": "natural"}, 0.0),
        run("fast", {"name": "fast"}, 0.43),
        run("fast-10", {"name": "fast"}, 0.004, evaluation("fgsm-1", 0.6, flags=[FLAG])),
        run("fast-9", {"name": "fast"}, 0.41, seed=8),
        run("free-2", {"name": "free", "replays": 2}, 0.43),
        run("free-4", {"name": "free", "replays": 4}, 0.46, evaluation("autoattack", 0.43)),
        run("pgd", {"name": "pgd"}, 0.5, evaluation("autoattack", 0.47)),
        run(MARKUP, {"name": "trades"}, 0.48),
        run(LONG, {"name": "trades"}, 0.47, results=[], finished=False),
    ]
    for each in runs[1:4]:
        add_examples(each, channels=3, size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "dist_adv.report.figures.album._save",
            lambda figure, path: Image.new("RGB", (2, 1)).save(path),
        )
        return write_report(runs, tmp_path_factory.mktemp("report"))


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Open]:
    """`opened(width=1200, ...)`: the page in a window of its own, which nothing may disturb."""
    contexts, wrong = [], []

    def opened(width: int = 1200, **settings: object) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800}, **settings)
        contexts.append(context)
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on(
            "console",
            lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None,
        )
        context.on("request", lambda request: wrong.append(request.url) if asks(request) else None)
        page = context.new_page()
        page.goto(report.as_uri())
        return page

    def asks(request) -> bool:
        return request.url != report.as_uri() and not request.url.startswith("data:")

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def table(page: Page, title: str) -> Locator:
    return page.locator(".table").filter(has=page.get_by_role("heading", name=title, exact=True))


def column(page: Page, title: str, number: int) -> list[str]:
    """The texts of a table's column that are shown, without what is small."""
    cells = table(page, title).locator(f"tbody tr:visible td:nth-child({number})")
    return cells.evaluate_all(
        "cells => cells.map(cell => [...cell.childNodes]"
        ".filter(node => node.nodeName !== 'SMALL' && node.className !== 'flag')"
        ".map(node => node.textContent).join('').trim())"
    )


def unfold(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


def test_names_are_no_markup(opened: Open) -> None:
    page = opened()
    assert page.title() == "Adversarial training report"
    assert page.locator("img:not([src^='data:'])").count() == 0
    assert MARKUP in column(page, "Results", 1)


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_window(width: int, opened: Open) -> None:
    page = opened(width)
    unfold(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_wide_table_scrolls_by_itself(opened: Open) -> None:
    page = opened(390)
    scroll = table(page, "Results").get_by_role("region")
    assert scroll.evaluate("each => each.scrollWidth > each.clientWidth")
    scroll.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")


# Of every text that is shown its colour on the nearest background that is not transparent.
CONTRASTS = """() => {
  const rgb = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = rgb(colour).map(each => each / 255)
      .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((rgb(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.body.querySelectorAll("*:not(script)")]
    .filter(each => [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
    .map(each => {
      const [less, more] = [getComputedStyle(each).color, behind(each)].map(light)
        .sort((a, b) => a - b);
      const name = `${each.localName} ${each.textContent.trim().slice(0, 40)}`;
      return [name, (more + 0.05) / (less + 0.05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(scheme: str, opened: Open) -> None:
    page = opened(color_scheme=scheme)
    unfold(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = max(map(int, re.findall(r"\d+", background)))
    assert shade > 240 if scheme == "light" else shade < 40
    contrasts = page.evaluate(CONTRASTS)
    assert {name.split()[0] for name, _ in contrasts} >= {"td", "small", "a", "button", "output"}
    assert [each for each in contrasts if each[1] < 4.5] == []  # WCAG 2, AA
    # Figures are drawn for white.
    image = page.locator("img").first.evaluate("each => getComputedStyle(each).backgroundColor")
    assert image == {"light": "rgba(0, 0, 0, 0)", "dark": "rgb(255, 255, 255)"}[scheme]


def test_every_figure_has_a_text_of_its_own(opened: Open) -> None:
    page = opened()
    texts = page.locator("img").evaluate_all("all => all.map(each => each.getAttribute('alt'))")
    titles = page.locator("h3").all_text_contents()
    assert len(texts) == len(titles) > 10
    assert all(len(text.split()) > 8 for text in texts)
    assert len({*texts, *titles}) == len(texts) + len(set(titles))


def test_a_column_sorts_by_the_keyboard(opened: Open) -> None:
    """Upwards, downwards, and back; numbers by size, and what has none last."""
    page = opened()
    results = table(page, "Results")
    given = column(page, "Results", 1)
    results.get_by_role("region").focus()
    for _ in range(4):  # run, method, natural, then
        page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("FGSM-1")
    page.keyboard.press("Tab")
    title = results.get_by_role("columnheader", name="PGD-50-10", exact=True)
    upwards = ["0.0", "0.4", "41.0", "43.0", "43.0", "46.0", "48.0", "50.0", "-"]
    for key, order, said in (
        ("Enter", upwards, "ascending"),
        ("Space", [*upwards[-2::-1], "-"], "descending"),
    ):
        page.keyboard.press(key)
        assert column(page, "Results", 4 + 1) == order
        assert title.get_attribute("aria-sort") == said
        equal = [name for name in column(page, "Results", 1) if name in ("fast", "free-2")]
        assert equal == ["fast", "free-2"]  # both 43.0, in the order of the report
    page.keyboard.press("Enter")
    assert column(page, "Results", 1) == given
    assert title.get_attribute("aria-sort") is None


def test_times_and_names_sort_as_people_do(opened: Open) -> None:
    page = opened()
    results = table(page, "Results")
    results.get_by_role("button", name="Training time").click()
    number = 1 + results.locator("th").all_text_contents().index("Training time")
    assert column(page, "Results", number) == ["45 s", *["60 s"] * 6, "2.2 min", "117 min"]
    results.get_by_role("button", name="Run", exact=True).click()
    names = column(page, "Results", 1)
    assert [name for name in names if name.startswith("fast")] == ["fast", "fast-9", "fast-10"]
    assert results.locator("[aria-sort]").all_text_contents() == ["Run"]


def test_rows_are_filtered_and_counted(opened: Open) -> None:
    page = opened()
    results = table(page, "Results")
    count = results.get_by_role("status")
    expect(count).to_have_text("9 of 9 runs")
    assert count.get_attribute("aria-live") == "polite"
    box = results.get_by_label("Filter runs")
    box.press_sequentially("FREE m")
    expect(count).to_have_text("2 of 9 runs")
    assert column(page, "Results", 1) == ["free-4", "free-2"]
    results.get_by_role("button", name="Run", exact=True).click()
    assert column(page, "Results", 1) == ["free-2", "free-4"]
    assert len(column(page, "Hardware, data and versions", 1)) == 9  # a box is its table's
    box.fill("none like that")
    expect(count).to_have_text("0 of 9 runs")
    box.fill("")
    expect(count).to_have_text("9 of 9 runs")


def test_small_tables_have_no_controls(opened: Open) -> None:
    page = opened()
    for each in page.locator(".table").all():
        rows = each.locator("tbody tr").count()
        assert (each.get_by_role("button").count() > 0) == (rows >= 3)
        assert each.get_by_role("searchbox").count() == (rows >= 6)
    sizes = [each.locator("tbody tr").count() for each in page.locator(".table").all()]
    assert min(sizes) < 3 <= sorted(sizes)[1] < 6 <= max(sizes)


def test_on_paper_are_all_rows_and_no_controls(opened: Open) -> None:
    page = opened(color_scheme="dark")
    table(page, "Results").get_by_label("Filter runs").fill("free")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.get_by_label("Filter runs").filter(visible=True).count() == 0
    assert page.get_by_role("status").filter(visible=True).count() == 0
    assert len(column(page, "Results", 1)) == 9
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"


def test_without_scripts_the_page_is_whole(opened: Open) -> None:
    page = opened(java_script_enabled=False)
    expect(table(page, "Results").locator("tbody tr").filter(visible=True)).to_have_count(9)
    expect(page.locator("button, input, output")).to_have_count(0)
    expect(table(page, "Results").locator("th").first).to_have_text("Run")
