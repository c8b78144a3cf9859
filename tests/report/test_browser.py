"""The page in a real browser: it does what its controls say, and keeps to itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

from diffhook.log import RunLog
from diffhook.report import write_page
from tests.report.conftest import SAMPLES
from tests.report.logs import photographs, write_log
from tests.report.visits import Visit

pytestmark = pytest.mark.browser

_TEXT_OUTSIDE = """boxes => boxes.filter(box => [...box.querySelectorAll('*')].some(
    each => each.getBoundingClientRect().right > box.getBoundingClientRect().right + 1)).length"""

# Scores and boxes that lie under the button of their tile.
_UNDER_THE_BUTTON = """tiles => tiles.flatMap(tile => {
    const {left, right, top, bottom} = tile.querySelector(".look").getBoundingClientRect();
    return [...tile.querySelectorAll(".number, input, b")].filter(part => {
        const own = part.getBoundingClientRect();
        return own.left < right && own.right > left && own.top < bottom && own.bottom > top;
    }).map(part => part.outerHTML);
})"""


@pytest.fixture
def visit(browser: Any, page_file: Path) -> Iterator[Visit]:
    opened = Visit(browser, page_file, accept_downloads=True)
    yield opened
    assert opened.said == [], "the console must stay empty"
    assert opened.outside() == [], "nothing may be asked of anyone else"
    opened.context.close()


def test_what_a_sample_is_called_is_found_before_what_reasons_say(visit: Visit) -> None:
    find = visit.tab.get_by_label("Find")
    find.fill("12")  # numbers stand in many reasons
    assert visit.ids() == [12]
    find.fill("norm")
    texts = visit.tab.locator("#gallery > li").all_text_contents()
    assert texts
    assert all("norm" in text.lower() for text in texts)
    find.fill("")
    assert visit.tab.get_by_role("button", name="Select all found (200)").is_visible()


def test_it_sorts(visit: Visit) -> None:
    by_score = visit.ids()
    assert len(by_score) == 60
    assert by_score[0] == 7, "the sample whose gradient is NaN leads"
    visit.tab.get_by_label("Sort by").select_option(label="sample id")
    assert visit.ids() == list(range(60))
    visit.tab.get_by_label("Sort by").select_option(label="score")
    assert visit.ids() == by_score


def test_it_turns_pages(visit: Visit) -> None:
    seen = visit.ids()
    above, below = visit.tab.get_by_label("Next page of samples").all()
    for following in (above, below, below):
        following.click()
        seen += visit.ids()
    assert sorted(seen) == list(range(SAMPLES)), "every sample is on one page, on one only"
    assert above.is_disabled()
    assert below.is_disabled()
    assert "181–200 of 200 samples" in visit.tab.locator("#gallery-controls .where").inner_text()


def test_it_filters(visit: Visit) -> None:
    visit.tab.locator("#facet-reason .minor summary").click()
    kinds = visit.tab.locator("#facet-reason li").filter(has_not_text="none").get_by_role("checkbox")
    for box in kinds.all():
        box.check()
    assert set(range(3, SAMPLES, 20)) | {7} <= set(visit.ids()), "each planted sample has its reason"
    assert len(visit.ids()) < 60
    visit.tab.get_by_label("Find").fill("not finite")
    assert visit.ids() == [7]
    for box in kinds.all():
        box.uncheck()
    visit.tab.get_by_label("Find").fill("#123")
    assert visit.ids() == [123]
    visit.tab.get_by_label("Find").fill("nonsense")
    assert visit.tab.get_by_text("No sample fits these filters.").is_visible()


def test_what_is_selected_is_downloaded(visit: Visit, tmp_path: Path) -> None:
    download = visit.tab.get_by_role("button", name="Download exclude list")
    assert download.is_disabled()
    visit.tab.get_by_label("Select sample 7", exact=True).check()
    visit.tab.get_by_label("Next page of samples").first.click()
    other = visit.ids()[0]
    visit.tab.get_by_label(f"Select sample {other}", exact=True).check()
    assert visit.tab.get_by_text("2 samples selected").is_visible()
    visit.tab.get_by_label("selected only").check()
    assert set(visit.ids()) == {7, other}
    with visit.tab.expect_download() as started:
        download.click()
    started.value.save_as(tmp_path / "exclude.txt")
    assert np.loadtxt(tmp_path / "exclude.txt", dtype=int).tolist() == sorted([7, other])
    visit.tab.get_by_role("button", name="Clear").click()
    assert visit.tab.get_by_text("Nothing selected").is_visible()
    visit.tab.get_by_role("button", name="Undo").click()
    assert visit.tab.get_by_text("2 samples selected").is_visible()


def test_all_found_are_selected_and_copied(visit: Visit) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.tab.get_by_label("Find").fill("not finite")
    visit.tab.get_by_role("button", name="Select all found").click()
    visit.tab.get_by_role("button", name="Copy ids").click()
    visit.tab.wait_for_function("navigator.clipboard.readText().then(text => text === '7\\n')")


def test_samples_with_names_are_found_and_listed_by_them(browser: Any, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 16, 1, names=[f"Cat/{index} ü.png" for index in range(16)])
    write_page(tmp_path / "page.html", log, queries={})
    visit = Visit(browser, tmp_path / "page.html", permissions=["clipboard-read", "clipboard-write"])
    visit.tab.get_by_label("Find").fill("cat/7")
    visit.tab.get_by_label("Select sample 7 ü.png").check()
    visit.tab.get_by_role("button", name="Copy names").click()
    visit.tab.wait_for_function("navigator.clipboard.readText().then(text => text === 'Cat/7 ü.png\\n')")
    assert visit.said == []
    visit.context.close()


def test_it_switches_between_methods(visit: Visit) -> None:
    answers = visit.tab.locator(".query").first.locator(".answer").all()
    names = [answer.locator(".method b").inner_text() for answer in answers]
    assert len(names) == 3
    assert all(answer.is_visible() for answer in answers)
    for name in names:
        visit.tab.get_by_label(name, exact=True).check(force=True)
        assert [other for other, answer in zip(names, answers, strict=True) if answer.is_visible()] == [name]
    visit.tab.get_by_label("Side by side").check(force=True)
    assert all(answer.is_visible() for answer in answers)


def test_it_follows_the_system_until_told_otherwise(browser: Any, page_file: Path) -> None:
    def paper(visit: Visit) -> str:
        return str(visit.tab.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = (Visit(browser, page_file, color_scheme=scheme) for scheme in ("light", "dark"))
    assert paper(light) != paper(dark)
    light.tab.get_by_role("button", name="Dark").click()
    assert paper(light) == paper(dark)
    ink = dark.tab.locator(".chart text").first.evaluate("text => getComputedStyle(text).fill")
    assert ink == light.tab.locator(".chart text").first.evaluate("text => getComputedStyle(text).fill")
    dark.tab.emulate_media(media="print")
    assert paper(dark) == "rgb(255, 255, 255)", "paper is white"
    light.context.close()
    dark.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_violation(browser: Any, page_file: Path, scheme: str, width: int) -> None:
    visit = Visit(browser, page_file, color_scheme=scheme)
    visit.tab.set_viewport_size({"width": width, "height": 900})
    visit.tab.locator("summary").first.click()
    found = Axe().run(visit.tab).response["violations"]
    serious = {v["id"]: v["nodes"][0]["html"] for v in found if v["impact"] in ("serious", "critical")}
    assert serious == {}
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert visit.tab.evaluate(overflow) <= 0, "a page must not scroll sideways"
    visit.context.close()


def test_names_as_long_as_paths_wrap_at_every_width(browser: Any, tmp_path: Path) -> None:
    names = [
        f"set/{'a-long-folder-name-' * 4}{i}/{'an_even_longer_file_name_' * 4}{i}.png" for i in range(64)
    ]
    log = write_log(tmp_path / "log", 64, 1, names=names)
    images = dict(zip(sorted(log.names()), photographs(64, 16), strict=True))
    write_page(tmp_path / "page.html", log, images=images)
    visit = Visit(browser, tmp_path / "page.html")

    def text_is_inside() -> None:
        outside = visit.tab.locator(".tile, .influences > li").evaluate_all(_TEXT_OUTSIDE)
        assert outside == 0, "text beside its picture overprints its neighbour"

    visit.fit_every_width(text_is_inside)
    assert visit.said == []
    visit.context.close()


@pytest.mark.parametrize("pictures", [True, False])
def test_the_button_that_opens_covers_nothing_and_a_name_no_screen(
    browser: Any, tmp_path: Path, pictures: bool
) -> None:
    names = [f"{i}-{'long' * 250}-{i}.png" for i in range(64)]
    log = write_log(tmp_path / "log", 64, 1, names=names)
    images = dict(zip(sorted(log.names()), photographs(64, 16), strict=True)) if pictures else None
    write_page(tmp_path / "page.html", log, images=images)
    visit = Visit(browser, tmp_path / "page.html")
    tiles = visit.tab.locator("#gallery > li")
    assert tiles.evaluate_all(_UNDER_THE_BUTTON) == []
    assert max(tiles.evaluate_all("tiles => tiles.map(tile => tile.offsetHeight)")) < 500
    name = log.names()[visit.ids()[0]]
    shown = tiles.first.locator(".name").inner_text()
    assert (shown[:40], shown[-40:]) == (name[:40], name[-40:])
    assert len(shown) < 200
    assert name in str(tiles.first.locator("label").get_attribute("title"))
    tiles.first.locator(".look").click()
    assert visit.tab.locator("#detail h3").inner_text() == name
    visit.tab.keyboard.press("Escape")
    visit.fit_every_width()
    assert visit.said == []
    visit.context.close()


def test_thousands_of_samples_stay_out_of_the_document(browser: Any, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 5000, 1)
    write_page(tmp_path / "page.html", log, queries={}, top=5000)
    visit = Visit(browser, tmp_path / "page.html")
    assert "1–60 of 5,000 samples" in visit.tab.locator("#gallery-controls .where").inner_text()
    assert visit.tab.evaluate("document.querySelectorAll('*').length") < 2500
    visit.tab.get_by_label("Sort by").select_option(label="sample id")
    visit.tab.get_by_label("Find").fill("4999")
    assert visit.ids() == [4999]
    assert visit.said == []
    visit.context.close()


def test_without_scripts_everything_is_there(browser: Any, page_file: Path, log: RunLog) -> None:
    visit = Visit(browser, page_file, java_script_enabled=False)
    assert visit.tab.locator("#gallery > li").count() == SAMPLES
    assert visit.tab.get_by_label("Sort by").is_visible() is False, "controls that do nothing are not shown"
    visit.context.close()
