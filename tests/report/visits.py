"""A page in a browser's tab."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_PATIENCE = 120_000  # ms: a busy machine is slow, not wrong
_DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


class Visit:
    """A tab, and all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        self.context.set_default_timeout(_PATIENCE)
        self.tab = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(path.as_uri())

    def ids(self) -> list[int]:
        """Samples now in the gallery, in order."""
        found = self.tab.locator("#gallery > li").evaluate_all("tiles => tiles.map(t => +t.dataset.sample)")
        return list(found)

    def fit_every_width(self, check: Callable[[], None] = lambda: None) -> None:
        """From phones to wide screens, light and dark, nothing scrolls sideways."""
        for width in (320, 390, 1280, 2200):
            self.tab.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                self.tab.emulate_media(color_scheme=scheme)
                self.tab.evaluate(_DRAWN)
                assert self.tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
                check()

    def outside(self) -> list[str]:
        """Requests for anything but the file itself and what it carries."""
        return [url for url in self.asked if not url.startswith(("data:", "blob:", self.tab.url))]
