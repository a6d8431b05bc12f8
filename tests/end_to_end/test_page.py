"""report.html in a real browser, from file:// and without a network: it sorts, filters and answers to the pointer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.recipe import Recipe
from pipeline.report.data import load_report
from pipeline.report.page import render_page
from pipeline.rundir.run_dir import RunDir
from tests.browser import Browser, browser_or_skip
from tests.unit.test_report import SYSTEMS, run  # noqa: F401 a fixture

SHOWN = "[...document.querySelectorAll('#systems tbody tr')].filter(row => !row.hidden)"
BLEU_COLUMN, ASSEMBLY_COLUMN = 5, 4


@pytest.fixture
def browser(run: RunDir, tmp_path: Path) -> Iterator[Browser]:  # noqa: F811
    program = browser_or_skip()
    page = tmp_path / "report.html"
    page.write_text(render_page(load_report(Recipe(name="page"), run)), encoding="utf-8")
    opened = Browser(program, tmp_path / "profile", page)
    yield opened
    opened.close()


def column(browser: Browser, number: int) -> list[str]:
    return browser.evaluate(f"{SHOWN}.map(row => row.cells[{number}].textContent.trim())")


def bleus(browser: Browser) -> list[float]:
    return [float(text.split()[0]) for text in column(browser, BLEU_COLUMN)]


def test_the_page_works_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    assert browser.evaluate("location.protocol") == "file:"
    assert len(bleus(browser)) == 7, "a line for each request"

    heading = f"#systems thead th:nth-child({BLEU_COLUMN + 1}) button"
    browser.click(heading)
    assert bleus(browser) == sorted(bleus(browser))
    browser.click(heading)
    assert bleus(browser) == sorted(bleus(browser), reverse=True)
    assert browser.evaluate("document.querySelector('th[aria-sort]').textContent") == "BLEU"
    browser.click("#systems thead th:nth-child(2) button")
    asked = column(browser, 1)
    assert asked == ["2", "2", "6", "6", "", "", ""], "what has no value comes last"

    browser.write("#filter", "e6-d6 speed")
    assert column(browser, ASSEMBLY_COLUMN) == ["e6-d6"]
    assert browser.evaluate("document.getElementById('shown').textContent") == "1 of 7"
    browser.evaluate("filter.value = ''; filter.dispatchEvent(new Event('input'))")
    browser.click(".group[value='size-first']")
    assert len(bleus(browser)) == 5

    point = ".point.speed-first[data-name='e1x4.2-d6']"
    assert browser.evaluate("document.getElementById('tip').hidden")
    browser.point_at(f"{point} path")
    tip = browser.evaluate("document.getElementById('tip').textContent")
    assert tip.startswith("e1x4.2-d6 (speed-first): 96.5 BLEU (95.5 to 97.5)")
    assert browser.evaluate("document.querySelector('tr.lit').dataset.name") == "e1x4.2-d6"
    browser.point_at("h1")
    assert browser.evaluate("document.getElementById('tip').hidden")

    colours = []
    for scheme in ("light", "dark"):
        browser.set_scheme(scheme)
        colours.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        browser.screenshot(Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"{scheme}.png")
    assert colours == ["rgb(251, 251, 249)", "rgb(20, 23, 27)"]
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    assert {name for name, *_ in SYSTEMS} >= set(browser.evaluate(
        "[...document.querySelectorAll('.point')].map(point => point.dataset.name)"))  # fmt: skip
