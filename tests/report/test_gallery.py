"""The gallery in a real browser: copies and labels side by side, small tiles, keys, and the way through the
reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

import diffhook
from diffhook.analysis.ranking import Labels, Ranking
from diffhook.analysis.reason import Reason
from diffhook.log import RunLog
from diffhook.report import write_page
from tests.report.conftest import SAMPLES
from tests.report.logs import photographs
from tests.report.visits import Visit

pytestmark = pytest.mark.browser

GROUPS = [(20, 21), (30, 31, 32)]  # exact, and near
DOUBTED = [40, 12, 50]


@pytest.fixture(scope="module")
def page_with_copies(log: RunLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ranking = diffhook.outliers(log)
    kinds = dict(zip(GROUPS, ("exact copy", "near copy"), strict=True))
    of = {sample: (group, kind) for group, kind in kinds.items() for sample in group}

    def flags(sample: int, given: tuple[str, ...]) -> tuple[str, ...]:
        if sample not in of:
            return given
        group, kind = of[sample]
        others = tuple(other for other in group if other != sample)
        return (Reason(f"like {others}", kind, f"like #{others[0]}", others),)

    told = [flags(int(i), given) for i, given in zip(ranking.sample_ids, ranking.reasons, strict=True)]
    path = tmp_path_factory.mktemp("copies") / "page.html"
    doubted = in_doubt(replace(ranking, reasons=tuple(told)))
    write_page(path, log, doubted, photographs(SAMPLES), queries={})
    return path


def in_doubt(ranking: Ranking) -> Ranking:
    """Samples of :data:`DOUBTED` are "cat" and seem to be "dog", by falling strength."""
    order = ranking.sample_ids.tolist()
    scores = np.array([4.0 - DOUBTED.index(i) if i in DOUBTED else 0.1 for i in order])
    own = tuple("cat" if i in DOUBTED or i % 2 else "dog" for i in order)
    better = tuple("dog" if each == "cat" else "cat" for each in own)
    return replace(ranking, labels=Labels(own, better), signals={**ranking.signals, "label": scores})


@pytest.fixture
def visit(browser: Any, page_with_copies: Path) -> Iterator[Visit]:
    opened = Visit(browser, page_with_copies, permissions=["clipboard-read", "clipboard-write"])
    yield opened
    assert opened.said == [], "the console must stay empty"
    opened.context.close()


def groups(visit: Visit) -> list[list[int]]:
    found = visit.tab.locator("#gallery > .group").evaluate_all(
        "all => all.map(each => [...each.querySelectorAll('.tile')].map(tile => +tile.dataset.sample))"
    )
    return list(found)


def pick(visit: Visit, kind: str) -> None:
    visit.tab.locator("#facet-reason").get_by_role("button", name=kind, exact=True).click()


def test_who_asks_for_copies_sees_them_side_by_side_and_keeps_one_of_each(visit: Visit) -> None:
    pick(visit, "exact copy")
    assert [sorted(group) for group in groups(visit)] == [[20, 21]]
    visit.tab.get_by_label("Also near copy").check()
    shown = groups(visit)
    assert sorted(map(sorted, shown)) == [[20, 21], [30, 31, 32]]
    assert visit.tab.locator(".closeness").all_inner_texts()[0] == "identical"
    assert visit.tab.get_by_role("button", name="Select all found").is_hidden(), "it would take both"
    visit.tab.get_by_role("button", name="Keep one of each (3)").click()
    visit.tab.get_by_role("button", name="Copy ids").click()
    spare = sorted(sample for group in shown for sample in group[1:])
    text = "".join(f"{sample}\\n" for sample in spare)
    visit.tab.wait_for_function(f"navigator.clipboard.readText().then(text => text === '{text}')")
    visit.tab.get_by_role("button", name="Keep all").first.click()
    assert visit.tab.get_by_text(f"{3 - len(shown[0]) + 1} samples selected").is_visible()
    visit.tab.get_by_label("Also near copy").uncheck()
    visit.tab.get_by_label("Also exact copy").uncheck()
    assert len(visit.ids()) == 60, "and anything else one by one"


def test_of_copies_already_excluded_no_further_one_is_selected(visit: Visit) -> None:
    pick(visit, "exact copy")
    pair = visit.tab.locator("#gallery > .group")
    [left, right] = groups(visit)[0]
    pair.get_by_role("button", name="Keep right").click()
    assert selected(visit) == {left}
    assert visit.tab.get_by_role("button", name="Keep one of each (0)").is_visible()
    assert pair.get_by_role("button", name="Keep left").is_hidden(), "the left one is excluded"
    assert visit.tab.locator("#left").inner_text() == "0 left."
    visit.tab.get_by_label(f"Select sample {right}", exact=True).check()
    pair.get_by_role("button", name="Both excluded · restore").click()
    assert selected(visit) == set()
    pick(visit, "near copy")
    three = groups(visit)[0]
    visit.tab.get_by_label(f"Select sample {three[0]}", exact=True).check()
    visit.tab.get_by_role("button", name="Keep one of each (1)").click()
    assert selected(visit) == {three[0], three[2]}, "the first of those that are left stays"


def selected(visit: Visit) -> set[int]:
    found = visit.tab.locator("#gallery .tile.chosen").evaluate_all("all => all.map(t => +t.dataset.sample)")
    return set(found)


def test_a_reason_is_alone_by_its_name_added_by_its_box_and_inverted(visit: Visit) -> None:
    pick(visit, "exact copy")
    pick(visit, "near copy")
    pick(visit, "near copy")
    assert [sorted(group) for group in groups(visit)] == [[30, 31, 32]]
    visit.tab.get_by_label("Also exact copy").check()
    assert len(groups(visit)) == 2
    pick(visit, "exact copy")
    visit.tab.locator("#facet-reason").get_by_role("button", name="all but these").click()
    boxes = visit.tab.locator("#facet-reason input").all()
    for box in boxes:  # the list may still be drawn
        others = "exact copy" not in str(box.get_attribute("aria-label"))
        expect(box).to_be_checked(checked=others)


def test_labels_stand_beside_what_they_mean_strongest_first(visit: Visit) -> None:
    pick(visit, "labels to compare")
    tiles = visit.tab.locator("#gallery > .doubt .tile")
    samples = "all => all.map(tile => +tile.dataset.sample)"
    assert tiles.evaluate_all(samples) == DOUBTED
    first = visit.tab.locator("#gallery > .doubt").first
    assert [first.locator(f".{side} b").inner_text() for side in ("own", "better")] == ["cat", "dog?"]
    assert first.locator(".own canvas").count() == first.locator(".better canvas").count() == 3
    tiles.first.locator("label").click()
    assert tiles.evaluate_all(samples) == DOUBTED, "nothing moves under the pointer"
    pick(visit, "exact copy")
    pick(visit, "labels to compare")
    assert tiles.evaluate_all(samples) == [*DOUBTED[1:], DOUBTED[0]], "what is decided comes last"
    assert visit.tab.locator("#left").inner_text() == "2 left."


def test_labels_that_stand_out_less_wait_for_a_click(browser: Any, log: RunLog, tmp_path: Path) -> None:
    ranking = in_doubt(diffhook.outliers(log))
    strong = {**ranking.signals, "label": ranking.signals["label"] + 1}  # all are in doubt
    write_page(tmp_path / "page.html", log, replace(ranking, signals=strong), queries={})
    visit = Visit(browser, tmp_path / "page.html")
    pick(visit, "labels to compare")
    rows = visit.tab.locator("#gallery > .doubt")
    assert rows.count() == round(0.07 * SAMPLES)
    assert rows.first.locator(".strength").inner_text() == "1 in 100,000 by chance"
    samples = "all => all.map(row => +row.querySelector('.tile').dataset.sample)"
    seen = rows.evaluate_all(samples)
    visit.tab.get_by_role("button", name="Show the other").click()
    assert not set(seen) & set(rows.evaluate_all(samples)), "what was seen comes after the others"
    assert f"of {SAMPLES} samples" in visit.tab.locator("#gallery-controls .where").inner_text()
    pick(visit, "labels to compare")
    assert visit.said == []
    visit.context.close()


def test_the_way_through_the_reasons_is_the_curators_and_counts(visit: Visit) -> None:
    names = visit.tab.locator("#facet-reason .value").all_text_contents()
    turn = visit.tab.locator("#next-reason")
    assert not visit.tab.locator("#facet-reason .minor").get_by_role("button", name="high norm").is_visible()
    for name in names[: names.index("none")]:
        assert turn.inner_text().endswith(f"{name} ›")
        turn.click()
        assert visit.tab.locator("#facet-reason [aria-pressed=true]").all_inner_texts() == [name]
    assert turn.is_disabled()
    assert turn.inner_text() == "Main checks done"
    pick(visit, "labels to compare")
    visit.tab.get_by_role("button", name="Select all found (3)").click()
    row = visit.tab.locator("#facet-reason li", has_text="labels to compare")
    assert row.locator(".done").inner_text() == "3 selected"


def test_keys_move_select_undo_open_and_turn_reasons(visit: Visit) -> None:
    boxes = visit.tab.locator("#gallery > .tile input")
    focused = "document.activeElement.closest('li.tile').dataset.sample"
    boxes.first.focus()
    ids = visit.ids()
    visit.tab.keyboard.press("ArrowRight")
    assert visit.tab.evaluate(focused) == str(ids[1])
    visit.tab.keyboard.press("x")
    visit.tab.keyboard.press("ArrowDown")
    below = ids.index(int(visit.tab.evaluate(focused)))
    assert below > 2, "a row further"
    visit.tab.keyboard.press("Shift+Space")
    assert visit.tab.get_by_text(f"{below} samples selected").is_visible(), "all between, with both ends"
    visit.tab.keyboard.press("u")
    assert visit.tab.get_by_text("1 sample selected").is_visible()
    visit.tab.keyboard.press("Enter")
    dialog = visit.tab.get_by_role("dialog")
    assert dialog.get_by_role("heading").first.inner_text() == f"#{ids[below]}"
    visit.tab.keyboard.press("x")
    visit.tab.keyboard.press("Escape")
    assert visit.tab.get_by_text("2 samples selected").is_visible()
    visit.tab.keyboard.press("n")
    assert visit.tab.locator("#facet-reason [aria-pressed=true]").count() == 1
    visit.tab.get_by_label("Find").press("n")
    assert visit.tab.get_by_label("Find").input_value() == "n", "who writes is left alone"


def test_keys_go_on_after_a_click_whose_button_is_gone(visit: Visit) -> None:
    pick(visit, "exact copy")
    visit.tab.locator("#gallery > .group").first.get_by_role("button", name="Keep right").click()
    pressed = visit.tab.locator("#facet-reason [aria-pressed=true]")
    visit.tab.evaluate("document.activeElement.blur()")
    visit.tab.keyboard.press("n")
    assert pressed.all_inner_texts() != ["exact copy"]
    visit.tab.keyboard.press("p")
    assert pressed.all_inner_texts() == ["exact copy"]


def test_x_takes_what_the_mouse_is_on_until_an_arrow_key_moves(visit: Visit) -> None:
    tiles, ids = visit.tab.locator("#gallery > .tile"), visit.ids()
    tiles.nth(0).locator("input").focus()
    tiles.nth(3).hover()
    visit.tab.keyboard.press("x")
    assert selected(visit) == {ids[3]}
    visit.tab.keyboard.press("ArrowRight")
    visit.tab.keyboard.press("x")
    assert len(selected(visit)) == 2


def test_a_click_selects_and_two_open_without_selecting(visit: Visit) -> None:
    picture = visit.tab.locator("#gallery > .tile img").first
    picture.click()
    assert visit.tab.get_by_text("1 sample selected").is_visible()
    picture.dblclick()
    assert visit.tab.get_by_role("dialog").is_visible()
    assert visit.tab.get_by_text("1 sample selected").count() == 1


def test_small_tiles_show_four_times_as_many_and_open(visit: Visit) -> None:
    visit.tab.get_by_label("Small").check(force=True)
    assert len(visit.ids()) == min(4 * 60, SAMPLES)
    first = visit.tab.locator("#gallery > .tile").first
    assert first.bounding_box()["width"] < 90
    assert first.locator("label").get_attribute("title").startswith(f"#{visit.ids()[0]}")
    first.hover()
    first.get_by_role("button", name="Open sample").click()
    assert visit.tab.get_by_role("dialog").is_visible()
    found = Axe().run(visit.tab).response["violations"]
    assert {v["id"]: v["nodes"][0]["html"] for v in found if v["impact"] in ("serious", "critical")} == {}


def test_an_opened_sample_leads_to_its_copies(visit: Visit) -> None:
    visit.tab.get_by_label("Find").fill("#30")
    visit.tab.locator("#gallery > .tile").first.hover()
    visit.tab.get_by_role("button", name="Open sample 30").click()
    detail = visit.tab.get_by_role("dialog")
    assert sorted(detail.locator(".twins li").all_inner_texts()) == ["#31", "#32"]
    detail.get_by_role("button", name="#32").click()
    assert detail.get_by_role("heading").first.inner_text() == "#32"


def test_a_reason_opens_its_own_sentence_only(visit: Visit) -> None:
    several = visit.tab.locator("#gallery .reasons").filter(has=visit.tab.locator("li:nth-child(2)")).first
    several.locator("summary").first.click()
    assert several.locator("[open]").count() == 1


@pytest.mark.parametrize("kind", ["near copy", "labels to compare"])
def test_what_stands_side_by_side_fits_every_width(visit: Visit, kind: str) -> None:
    pick(visit, kind)
    visit.fit_every_width()
    found = Axe().run(visit.tab).response["violations"]
    assert {v["id"]: v["nodes"][0]["html"] for v in found if v["impact"] in ("serious", "critical")} == {}
    visit.tab.get_by_label("Small").check(force=True)
    visit.fit_every_width()
