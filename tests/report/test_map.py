"""The page's map in a real browser: what is marked on it is what the gallery shows and the list excludes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

from diffhook.report import write_page
from tests.report.conftest import SAMPLES
from tests.report.logs import photographs, write_log
from tests.report.visits import Visit

pytestmark = pytest.mark.browser

_MARGIN = 18  # pixels around the map at zoom 1


class Map:
    """The map of a page, as one who sees it knows it."""

    def __init__(self, visit: Visit) -> None:
        self.visit, self.tab = visit, visit.tab
        self.stage = self.tab.locator("#stage")
        self.stage.wait_for()
        self.stage.scroll_into_view_if_needed()
        self.data: dict[str, Any] = json.loads(self.tab.locator("#samples").text_content())
        self.box = self.stage.bounding_box()

    def points(self) -> np.ndarray:
        """(N, 2) where samples lie in the stage while all of the map is in view, by rank."""
        inner = self.stage.evaluate("stage => [stage.clientWidth, stage.clientHeight]")
        size = np.array(inner) - 2 * _MARGIN
        return np.array(self.data["places"]).T / 10_000 * size + _MARGIN

    def drag(self, *points: tuple[float, float]) -> None:
        x, y = self.box["x"] + 1, self.box["y"] + 1  # within the border
        first, *others = [(x + left, y + top) for left, top in points]
        self.tab.mouse.move(*first)
        self.tab.mouse.down()
        for point in others:
            self.tab.mouse.move(*point, steps=4)
        self.tab.mouse.up()

    def ids(self, inside: np.ndarray) -> list[int]:
        return [sample for sample, within in zip(self.data["ids"], inside, strict=True) if within]

    def shown(self) -> list[int]:
        """Samples of all pages of the gallery."""
        found = self.visit.ids()
        following = self.tab.locator("#gallery-controls").get_by_label("Next page of samples")
        while following.is_visible() and following.is_enabled():
            following.click()
            found += self.visit.ids()
        return found

    def in_view(self) -> int:
        """How many samples are in view."""
        self.stage.press("Enter")
        count = len(self.shown())
        self.stage.press("Escape")
        return count


@pytest.fixture
def page_map(browser: Any, page_file: Path) -> Iterator[Map]:
    visit = Visit(browser, page_file, accept_downloads=True)
    yield Map(visit)
    assert visit.said == [], "the console must stay empty"
    assert visit.outside() == [], "nothing may be asked of anyone else"
    visit.context.close()


def test_the_gallery_shows_what_a_rectangle_marks_and_the_list_excludes_it(
    page_map: Map, tmp_path: Path
) -> None:
    points, tab = page_map.points(), page_map.tab
    left, top = np.quantile(points, 0.3, axis=0).round()
    right, bottom = np.quantile(points, 0.8, axis=0).round()
    tab.get_by_label("Rectangle").check(force=True)
    page_map.drag((left, top), (right, bottom))
    inside = ((points > (left, top)) & (points < (right, bottom))).all(1)
    assert 5 < inside.sum() < SAMPLES
    assert page_map.shown() == page_map.ids(inside), "in the order of the ranking"
    assert tab.locator("#marked").inner_text() == f"{inside.sum()} marked, shown below"
    tab.get_by_role("button", name="Select all found").click()
    with tab.expect_download() as started:
        tab.get_by_role("button", name="Download exclude list").click()
    started.value.save_as(tmp_path / "exclude.txt")
    assert np.loadtxt(tmp_path / "exclude.txt", dtype=int).tolist() == sorted(page_map.ids(inside))
    tab.get_by_role("button", name="Unmark").click()
    assert len(page_map.shown()) == SAMPLES


def test_a_lasso_marks_what_is_inside_it(page_map: Map) -> None:
    points = page_map.points()
    (left, top), (right, bottom) = points.min(0).round() + 7.25, points.max(0).round()
    page_map.tab.get_by_label("Lasso").check(force=True)
    page_map.drag((left, top), (right, top), (left, bottom))
    slope = (points[:, 0] - left) / (right - left) + (points[:, 1] - top) / (bottom - top)
    sure = np.abs(slope - 1) > 0.01  # a hand's triangle, in steps
    marked = np.isin(page_map.data["ids"], page_map.shown())
    expected = (slope < 1) & (points[:, 0] > left) & (points[:, 1] > top)
    assert 0 < marked.sum() < SAMPLES
    assert (marked == expected)[sure].all()


def test_shift_marks_while_moving_is_chosen_and_a_drag_without_it_moves(page_map: Map) -> None:
    page_map.tab.keyboard.down("Shift")
    page_map.drag((20, 20), (300, 300))
    page_map.tab.keyboard.up("Shift")
    assert page_map.tab.get_by_role("button", name="Unmark").is_visible()
    page_map.stage.press("Escape")
    page_map.stage.press("+")
    page_map.drag((300, 200), (100, 100))
    assert page_map.tab.get_by_role("button", name="Unmark").is_hidden()


def test_keys_move_zoom_mark_and_let_go(page_map: Map) -> None:
    assert page_map.in_view() == SAMPLES
    for _ in range(4):
        page_map.stage.press("+")
    closer = page_map.in_view()
    assert 0 < closer < SAMPLES
    for _ in range(30):
        page_map.stage.press("Shift+ArrowLeft")
    moved = page_map.in_view()
    assert moved != closer
    page_map.stage.press("0")
    assert page_map.in_view() == SAMPLES


def test_the_wheel_and_the_buttons_zoom(page_map: Map) -> None:
    page_map.tab.wait_for_timeout(400)  # since the page scrolled to the map
    page_map.stage.hover()
    page_map.tab.mouse.wheel(0, -400)
    assert page_map.in_view() < SAMPLES
    page_map.tab.get_by_role("button", name="Fit").click()
    assert page_map.in_view() == SAMPLES
    page_map.tab.get_by_role("button", name="Zoom in").click()
    page_map.tab.get_by_role("button", name="Zoom in").click()
    assert page_map.in_view() < SAMPLES
    page_map.tab.get_by_role("button", name="Mark what is in view").click()
    assert page_map.tab.get_by_role("button", name="Unmark").is_visible()


def test_a_page_that_scrolls_goes_on_scrolling_over_the_map(page_map: Map) -> None:
    page_map.tab.evaluate("performance.now = () => 0")  # a slow machine makes no pause of it
    page_map.tab.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    page_map.tab.mouse.move(640, 450)
    for _ in range(12):
        page_map.tab.mouse.wheel(0, 60)
        page_map.tab.wait_for_timeout(40)
    assert page_map.tab.evaluate("scrollY") > 300
    assert page_map.in_view() == SAMPLES


def test_two_fingers_zoom(browser: Any, page_file: Path) -> None:
    visit = Visit(browser, page_file, has_touch=True)
    found = Map(visit)
    hands = visit.context.new_cdp_session(visit.tab)
    middle = found.box["x"] + found.box["width"] / 2, found.box["y"] + found.box["height"] / 2

    def touch(kind: str, apart: float | None) -> None:
        fingers = (
            []
            if apart is None
            else [{"x": middle[0] + s * apart, "y": middle[1], "id": n} for n, s in enumerate((-1, 1))]
        )
        hands.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    touch("touchStart", 30)
    for apart in range(40, 160, 20):
        touch("touchMove", apart)
    touch("touchEnd", None)
    assert found.in_view() < SAMPLES
    visit.context.close()


def test_a_click_selects_a_sample_two_open_it_and_with_shift_it_is_marked(page_map: Map) -> None:
    tab, (first, second) = page_map.tab, page_map.data["ids"][:2]
    x, y = page_map.points()[0]
    page_map.stage.hover(position={"x": x, "y": y})
    assert tab.locator("#card").inner_text().startswith(f"#{first}")
    page_map.stage.click(position={"x": x, "y": y})
    assert tab.get_by_label(f"Select sample {first}", exact=True).is_checked(), "the highest lies above all"
    page_map.stage.dblclick(position={"x": x, "y": y})
    detail = tab.get_by_role("dialog")
    assert detail.get_by_role("heading").first.inner_text() == f"#{first}"
    assert detail.get_by_label("Leave it out of the next run").is_checked(), "opening selects nothing"
    sentences = [sentence for _, sentence in page_map.data["reasons"]["0"]]
    assert detail.locator(".sentences li").all_inner_texts() == sentences
    tab.keyboard.press("ArrowRight")
    assert detail.get_by_role("heading").first.inner_text() == f"#{second}"
    detail.get_by_label("Leave it out of the next run").check()
    tab.keyboard.press("Escape")
    assert detail.is_hidden()
    assert tab.get_by_label(f"Select sample {second}", exact=True).is_checked()
    page_map.stage.click(position={"x": x, "y": y}, modifiers=["Shift"])
    assert detail.is_hidden()
    assert page_map.shown() == [first]


def _counts(tab: Any, facet: str) -> dict[str, int]:
    rows = tab.locator(f"#facet-{facet} li").all()
    return {
        row.locator(".value").inner_text(): int(row.locator(".number").inner_text().replace(",", ""))
        for row in rows
    }


def test_counts_are_of_what_all_else_leaves(page_map: Map) -> None:
    tab, data = page_map.tab, page_map.data
    tab.locator("#facet-reason .minor summary").click()
    of = {facet["name"]: [set(values) for values in facet["of"]] for facet in data["facets"]}
    names = {name: list(_counts(tab, name)) for name in of}
    chosen = names["reason"].index("high norm")
    tab.locator("#facet-reason").get_by_role("checkbox").nth(chosen).check()
    fit = np.array([chosen in values for values in of["reason"]])
    assert page_map.shown() == page_map.ids(fit)
    for position, (_, count) in enumerate(_counts(tab, "alert").items()):
        assert count == sum(position in of["alert"][i] for i in np.flatnonzero(fit))
    for position, (_, count) in enumerate(_counts(tab, "reason").items()):
        assert count == sum(position in values for values in of["reason"]), "its own choice leaves its counts"
    tab.locator("#facet-alert").get_by_role("checkbox").first.check()
    both = fit & np.array([0 in values for values in of["alert"]])
    assert page_map.shown() == page_map.ids(both)
    points = page_map.points()
    tab.get_by_label("Rectangle").check(force=True)
    page_map.drag((2, 2), (points[:, 0].mean().round(), page_map.box["height"] - 4))
    left = points[:, 0] < points[:, 0].mean().round()
    assert page_map.shown() == page_map.ids(both & left)
    assert _counts(tab, "reason")["high norm"] == (both & left).sum()
    tab.get_by_role("button", name="Filtered by alert: show all").click()
    assert page_map.shown() == page_map.ids(fit & left)


def test_samples_without_pictures_are_dots_and_can_be_marked(browser: Any, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", write_log(tmp_path / "log", 60, 2), queries={})
    visit = Visit(browser, tmp_path / "page.html")
    found = Map(visit)
    assert visit.tab.locator("#atlas").count() == 0
    assert found.in_view() == 60
    assert visit.said == []
    visit.context.close()


def test_ten_thousand_samples_are_one_file_that_moves(
    browser: Any, tmp_path: Path, record_property: Any
) -> None:
    pixels = photographs(500, 96)
    log = write_log(tmp_path / "log", 10_000, 1)
    size = write_page(
        tmp_path / "page.html",
        log,
        images=lambda sample: np.roll(pixels[sample % 500], sample // 500 * 4, axis=0),
        queries={},
    )
    assert size < 20e6
    visit = Visit(browser, tmp_path / "page.html")
    found = Map(visit)
    assert "1–60 of 10,000 samples" in visit.tab.locator("#gallery-controls .where").inner_text()
    assert visit.tab.evaluate("document.querySelectorAll('*').length") < 4000
    visit.tab.get_by_label("Find").fill(f"#{found.data['ids'][9000]}")
    assert visit.ids() == [found.data["ids"][9000]], "beyond those whose tiles the page has"
    pixel = "document.querySelector('#gallery canvas').getContext('2d').getImageData(16, 16, 1, 1).data[3]"
    visit.tab.wait_for_function(f"() => {pixel} === 255")
    visit.tab.get_by_label("Find").fill("")
    frames = visit.tab.evaluate(_FRAMES)
    record_property("frame_ms", frames)
    assert len(frames) > 10
    assert visit.said == []
    visit.context.close()


_FRAMES = """async () => {
  const stage = document.getElementById("stage"), times = [];
  let before = performance.now();
  for (let n = 0; n < 20; n++) {
    stage.dispatchEvent(new KeyboardEvent("keydown", { key: n % 2 ? "ArrowLeft" : "+" }));
    await new Promise((done) => stage.addEventListener("drawn", done, { once: true }));
    const now = performance.now();
    times.push(now - before);
    before = now;
  }
  return times;
}"""


def test_the_page_fits_every_width_in_both_schemes(browser: Any, page_file: Path) -> None:
    visit = Visit(browser, page_file)
    Map(visit)

    def the_review_is_inside() -> None:
        outside = visit.tab.locator("#review").evaluate_all(
            """([review]) => [...review.querySelectorAll("*")].filter(each =>
                each.offsetParent && each.getBoundingClientRect().right > innerWidth + 1).length"""
        )
        assert outside == 0

    visit.fit_every_width(the_review_is_inside)
    found = Axe().run(visit.tab).response["violations"]
    assert {v["id"]: v["nodes"][0]["html"] for v in found if v["impact"] in ("serious", "critical")} == {}
    visit.context.close()
