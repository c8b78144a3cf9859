"""The page about two runs says what has changed, with pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import diffhook
from diffhook.analysis.comparison import Estimate
from diffhook.cli import main
from diffhook.log import RunLog
from diffhook.report import write_comparison
from diffhook.report.parts.comparison import change_sentence
from tests.report.logs import photographs, write_log
from tests.report.visits import Visit

SAMPLES = 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunLog, RunLog]:
    """A run and one without the first of its samples, by name."""
    folder = tmp_path_factory.mktemp("runs")
    names = [f"cat/{index}.png" for index in range(SAMPLES)]
    return (
        write_log(folder / "before", SAMPLES, names=names),
        write_log(folder / "after", SAMPLES - 8, names=names[8:]),
    )


def _images(log: RunLog) -> dict[int, Any]:
    return dict(zip(sorted(log.names()), photographs(SAMPLES, 32), strict=True))


def test_it_shows_who_was_left_out_and_who_moved(runs: tuple[RunLog, RunLog], tmp_path: Path) -> None:
    size = write_comparison(tmp_path / "page.html", *runs, images=_images(runs[0]))
    html = (tmp_path / "page.html").read_text()
    assert size == len(html.encode())
    assert "://" not in html
    change = re.search(r'id="change".*?</section>', html, re.DOTALL)
    assert change is not None
    assert set(re.findall(r"<b>(\d+\.png)</b>", change[0])) == {f"{i}.png" for i in range(8)}
    assert change[0].count("data:image/webp") == 8
    moved = re.search(r'id="moved".*?</section>', html, re.DOTALL)
    assert moved is not None
    found = diffhook.compare(*runs)
    listed = re.findall(r"<b>([^<]+)</b>", moved[0])
    expected = [
        found.before.named(int(found.before.sample_ids[i])).removeprefix("cat/")
        for down in (False, True)
        for i in found.moved(24, down=down)
    ]
    assert listed == expected
    for part in ("loss", "gradient-norm"):
        assert re.search(rf'id="{part}".*?<svg class="chart"', html, re.DOTALL)


def test_a_change_within_its_error_is_called_none(runs: tuple[RunLog, RunLog]) -> None:
    found = diffhook.compare(*runs)
    vars(found)["change"] = Estimate(-0.1, 0.02)
    assert "has changed: 10.0% (± 2.0%) lower, over the last quarter" in change_sentence(found)
    vars(found)["change"] = Estimate(0.01, 0.02)
    assert "is as it was, within its error: 1.0% (± 2.0%) higher" in change_sentence(found)
    vars(found)["change"] = None
    assert "cannot be told" in change_sentence(found)


def test_the_command_writes_it(
    runs: tuple[RunLog, RunLog], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "change.html"
    before, after = (log.location for log in runs)
    assert main(["report", after, "--against", before, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == out.stat().st_size
    assert "What has changed" in out.read_text()
    assert main(["report", after, "--excluded", "exclude.txt", "--out", str(out)]) == 2
    assert "name that with --against" in capsys.readouterr().err
    for option in (["--labels", "x.txt"], ["--queries", "x"], ["--query-images", "x"], ["--source", "train"]):
        assert main(["report", after, "--against", before, *option, "--out", str(out)]) == 2
        assert f"{option[0]} is for the page of one run" in capsys.readouterr().err


@pytest.mark.browser
def test_it_fits_every_width(browser: Any, runs: tuple[RunLog, RunLog], tmp_path: Path) -> None:
    write_comparison(tmp_path / "page.html", *runs, images=_images(runs[0]))
    visit = Visit(browser, tmp_path / "page.html")
    visit.fit_every_width()
    assert visit.said == []
    visit.context.close()
