"""One log, its page, and the browser that opens it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffhook.log import RunLog
from diffhook.report import write_page
from tests.report.logs import QUERIES, photographs, write_log

SAMPLES = 200
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> RunLog:
    return write_log(tmp_path_factory.mktemp("report") / "log", SAMPLES)


@pytest.fixture(scope="session")
def page_file(log: RunLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with photographs of all samples and queries."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, log, images=photographs(SAMPLES), queries={"held-out": photographs(QUERIES, 160)})
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if found is None:
        pytest.fail(
            f"none of {', '.join(_CHROMIUM)} is on the PATH: apt-get install chromium, or leave these tests "
            'out with -m "not browser"',
            pytrace=False,
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:  # each launch has a fresh profile
        chromium = playwright.chromium.launch(executable_path=found, args=list(_FLAGS))
        yield chromium
        chromium.close()
