"""The example that the README's first command runs, on a few emoji and one epoch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji.py"
SMALL = dict(
    zip(
        ("epochs", "families", "singles", "planted", "held-out"),
        (2, 4, 24, 1, 3),
        strict=True,
    )
)
PICTURES = 4 * 6 + 24 - 3 + 2 * 1  # without those held out, with the copies


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("emoji")
    options = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    command = [sys.executable, EXAMPLE, "--out", out, *options]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_it_tells_how_well_each_fault_and_the_siblings_are_found(ran: tuple[Path, str]) -> None:
    out, told = ran
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    assert result["pictures"] == PICTURES
    assert {found["planted"] for found in result["faults"].values()} == {
        SMALL["planted"],
        2 * SMALL["planted"],
    }
    for fault, found in result["faults"].items():
        assert 0 <= found["auroc"] <= 1
        assert re.search(rf"^{fault} ", told, re.MULTILINE)
    assert set(result["siblings"]["precision"]) == {"whitened-retrac", "tracin", "retrac", "pixels"}
    assert result["siblings"]["precision"]["pixels"]["mean"] > 0.5, "siblings look alike"
    assert f"Now: open {out / 'page.html'}" in told


def test_its_page_and_its_ranking_name_the_files(ran: tuple[Path, str]) -> None:
    out, _ = ran
    files = {path.relative_to(out / "images").as_posix() for path in (out / "images").rglob("*.png")}
    page = (out / "page.html").read_text()
    assert set(re.findall(r'data-name="([^"]+)"', page)) == files
    assert len(files) == PICTURES
    assert page.count('class="query"') == 3 + 8
    assert len((out / "outliers.csv").read_text().splitlines()) == PICTURES + 1
