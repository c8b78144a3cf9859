"""From templates to HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context
from jinja2.runtime import Context
from markupsafe import Markup

import diffhook
from diffhook import words
from diffhook.errors import ConfigurationError
from diffhook.log.samples import sample_words, split_id

_LONGEST = 100  # letters of a name on the page; templates/tiles.js shortens to as many


@dataclass(frozen=True)
class Part:
    """One section of the page."""

    name: str
    title: str
    label: str  # in the list of parts
    html: Markup
    anchor: str


def part(name: str, title: str, label: str, /, **context: Any) -> Part:
    """The part whose template is parts/NAME. Of ``context``, ``names`` is id → name of samples."""
    return Part(name, title, label, render(f"parts/{name}.html.jinja", **context), anchor=name)


def render(template: str, **context: Any) -> Markup:
    """A template of this package, with everything from outside escaped."""
    return Markup(_environment().get_template(template).render(**context))


def check_page_path(path: Any) -> None:
    """Raises ConfigurationError unless a page can have this path: it comes before the log."""
    if not isinstance(path, str | Path):
        raise ConfigurationError(
            f'the page\'s path is {words.brief(path)}; expected write_page("page.html", log)'
        )
    if Path(path).is_dir():
        raise ConfigurationError(f"the page's path {path} is a folder; expected a file, such as page.html")


def write_parts(path: str | Path, title: str, place: str, parts: Iterable[Part | None]) -> int:
    """Write a page of these parts. Returns the file's size in bytes.

    Args:
        place: where what it is about lies.
    """
    page = render(
        "page.html.jinja",
        title=title or place,
        footer=f"diffhook {diffhook.__version__}, {date.today().isoformat()}, from {place}",
        parts=[part for part in parts if part is not None],
    )
    content = words.printable(page).encode()
    Path(path).write_bytes(content)
    return len(content)


@pass_context
def _sample(context: Context, sample: int) -> str:
    """Its name, or "#7" where it has none."""
    names = context.get("names") or {}
    told = sample_words(sample, names)
    return words.middle(told, _LONGEST) if split_id(sample)[0] in names else f"#{told}"


def breakable(name: str, whole: bool = False) -> Markup:
    """A name that a browser breaks after separators, before it cuts words. A very long one is shortened, and
    whole where the mouse is on it, unless ``whole``."""
    if not whole and len(name) > _LONGEST:
        return Markup('<span title="{}">{}</span>').format(
            name, breakable(words.middle(name, _LONGEST), True)
        )
    pieces = re.split(r"(?<=[/_-])(?=[^/_-])", name)
    return Markup("<wbr>").join(pieces)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("diffhook.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number,
        "count": "{:,}".format,
        "plural": words.plural,
        "sample": _sample,
        "breakable": breakable,
    }
    return environment
