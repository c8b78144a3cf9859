"""A small picture of a run's page: python examples/screenshot.py runs/emoji/page.html [OUT]

Needs the extra ``test`` and Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import shutil
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

RESULT = Path(__file__).parent / "results" / "page.png"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = ("--no-sandbox", "--disable-dev-shm-usage")
_SHOWN = {"width": 1280, "height": 860}
_WIDTH, _COLOURS = 1000, 128


def take(page: Path, section: str) -> bytes:
    """PNG of the page as a visitor sees it, from a section on."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(_BROWSERS)} is on the PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=list(_FLAGS))
        tab = chromium.new_page(viewport=_SHOWN, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.locator(f"#{section}").evaluate("part => part.scrollIntoView()")
        tab.wait_for_timeout(1000)  # until its pictures are painted
        taken = tab.screenshot()
        chromium.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=RESULT)
    parser.add_argument("--section", default="outliers", help="its id in the page")
    args = parser.parse_args()
    picture = Image.open(BytesIO(take(args.page, args.section))).convert("RGB")
    picture = picture.resize((_WIDTH, picture.height * _WIDTH // picture.width), Image.Resampling.LANCZOS)
    picture.quantize(_COLOURS).save(args.out, optimize=True)
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
