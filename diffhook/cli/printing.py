"""Tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """JSON on standard output; numbers that JSON does not know become null."""
    print(json.dumps(_finite(value), indent=1))


def tell(line: str) -> None:
    """A line for a person who waits, on standard error; nothing where that is no terminal."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], reading: str = "") -> None:
    """A table with a title, and one line that says how to read it."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, justify="left" if name in ("reasons", "message") else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = Console()
    console.print(table)
    if reading:
        console.print(reading, style="dim", highlight=False)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
