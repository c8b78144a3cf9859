"""Tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from diffhook import words
from diffhook.log.samples import ROLE_STRIDE, sample_words

_PIPED = 10_000  # columns: what a program reads is not wrapped


def print_json(value: Any) -> None:
    """JSON on standard output; numbers that JSON does not know become null."""
    print(json.dumps(_finite(value), indent=1))


def tell(line: str) -> None:
    """A line for a person who waits, on standard error; nothing where that is no terminal."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], reading: str = "") -> None:
    """A table with a title, and one line that says how to read it.

    Args:
        title: what it shows; may be empty.
        header: a name per column, with its unit where there is one.
        rows: numbers stand to the right, in three digits; everything else to the left, as it is.
        reading: what the numbers mean.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED)
    table = table_of(header, rows)
    if title:
        console.print(Text(words.one_line(title), style="bold"))
        console.print()
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    console.print()
    if reading:
        console.print(Text(words.printable(reading)))
        console.print()


def table_of(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """The table that :func:`print_table` prints."""
    cells = [list(row) for row in rows]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for index, name in enumerate(header):
        numeric = any(cells) and all(_is_number(row[index]) for row in cells)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(_cell(value)) for value in row))  # Text: brackets are not markup
    return table


def sample_cell(sample: int, names: Mapping[int, str]) -> int | str:
    """A sample in a table: its name, or else its id, a number unless it is a further row of a sample."""
    return sample_words(sample, names) if names or sample >= ROLE_STRIDE else int(sample)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if _is_number(value) and not isinstance(value, Integral):
        return words.number(float(value))
    return words.one_line(str(value))  # an id is copied as it stands


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
