"""The API reference is built from docstrings, which every public name has."""

from __future__ import annotations

import html
import importlib
import inspect
import re
from pathlib import Path

from tests.reference import PUBLIC, build


def test_every_public_name_is_in_the_reference_with_its_docstring(tmp_path: Path) -> None:
    build(tmp_path)
    for name in PUBLIC:
        page = html.unescape((tmp_path / f"{name.replace('.', '/')}.html").read_text())
        text = " ".join(re.sub(r"<[^>]+>", "", page).split())
        for public in importlib.import_module(name).__all__:
            value = getattr(importlib.import_module(name), public)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            assert value.__doc__, f"{name}.{public} has no docstring"
            first = value.__doc__.strip().splitlines()[0]
            words = re.findall(r"\w+", first.split("`")[0])[:5]
            assert f'id="{public}"' in page, f"{name}.{public} is not in the reference"
            assert re.search(r"\W+".join(words), text), f"{name}.{public}: {first!r} is not in the reference"
