"""The gallery in a real browser: copies side by side, small tiles, and reasons that open one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

import diffhook
from diffhook.analysis.reason import Reason
from diffhook.log import RunLog
from diffhook.report import write_page
from tests.report.conftest import SAMPLES
from tests.report.logs import photographs
from tests.report.visits import Visit

pytestmark = pytest.mark.browser

GROUPS = [(20, 21), (30, 31, 32)]  # exact, and near


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

    told = [flags(int(i), given) for i, given in zip(ranking.sample_ids, ranking.flags, strict=True)]
    path = tmp_path_factory.mktemp("copies") / "page.html"
    write_page(path, log, replace(ranking, flags=tuple(told)), photographs(SAMPLES), queries={})
    return path


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


def check(visit: Visit, kind: str, on: bool = True) -> None:
    visit.tab.locator("#facet-reason li", has_text=kind).get_by_role("checkbox").set_checked(on)


def test_who_asks_for_copies_sees_them_side_by_side_and_keeps_one_of_each(visit: Visit) -> None:
    check(visit, "exact copy")
    assert [sorted(group) for group in groups(visit)] == [[20, 21]]
    check(visit, "near copy")
    shown = groups(visit)
    assert sorted(map(sorted, shown)) == [[20, 21], [30, 31, 32]]
    assert visit.tab.get_by_role("button", name="Select all found").is_hidden(), "it would take both"
    visit.tab.get_by_role("button", name="Keep one of each group (select 3)").click()
    visit.tab.get_by_role("button", name="Copy ids").click()
    spare = sorted(sample for group in shown for sample in group[1:])
    text = "".join(f"{sample}\\n" for sample in spare)
    visit.tab.wait_for_function(f"navigator.clipboard.readText().then(text => text === '{text}')")
    visit.tab.get_by_role("button", name="Keep all").first.click()
    assert visit.tab.get_by_text(f"{3 - len(shown[0]) + 1} samples selected").is_visible()
    check(visit, "exact copy", False)
    check(visit, "near copy", False)
    assert len(visit.ids()) == 60, "and anything else one by one"


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


def test_groups_and_small_tiles_fit_every_width(visit: Visit, tmp_path: Path) -> None:
    check(visit, "near copy")
    visit.look_at_every_width(tmp_path)
    visit.tab.get_by_label("Small").check(force=True)
    visit.look_at_every_width(tmp_path)
