"""Tables for people."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest

from diffhook import words
from diffhook.cli.printing import print_json, print_table
from diffhook.console import progress_bar


def test_a_table_in_a_pipe_is_whole_and_plain(capsys: pytest.CaptureFixture[str]) -> None:
    long = "sample [red]7[/red] pulls hard; " * 20
    print_table("Title", ["sample", "norm", "message"], [(np.int64(4721), 0.000123456, long)], "Read me.")
    title, _, header, _, row, _, reading, *_ = capsys.readouterr().out.splitlines()
    assert title == "Title"
    assert header.split() == ["sample", "norm", "message"]
    assert row.strip() == f"4721   1.23 × 10⁻⁴   {long}".strip(), "neither wrapped, nor shortened, nor markup"
    assert reading == "Read me."


def test_numbers_stand_to_the_right_and_words_to_the_left(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("", ["rows", "kind"], [(5, "a"), (500, "bcd")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [lines[2], lines[3]] == ["     5   a", "   500   bcd"]


def test_json_has_null_where_a_number_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": None}


def test_progress_is_silent_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar() as bar:
        bar.advance(bar.add_task("work", total=2))
    assert stream.getvalue() == ""


def test_progress_tells_a_terminal_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as bar:
        bar.advance(bar.add_task("work", total=2))
        bar.refresh()
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "work" in shown
    assert "1/2" in shown
    assert ":" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12.0, "12"),
        (0.123456, "0.123"),
        (9.996, "10.00"),
        (1234.5, "1,234"),
        (-0.5, "−0.500"),
        (0.000123, "1.23 × 10⁻⁴"),
        (-2.5e9, "−2.50 × 10⁹"),
        (float("nan"), "–"),
        (float("-inf"), "−∞"),
    ],
)
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.2, 98.7, 998.9], ["0", "99", "999"]),
        ([0.003, 0.36, 0.38, 0.998], ["0.00", "0.36", "0.38", "1.00"]),
        ([0.5, 0.5], ["0", "0"]),
        ([-0.25, 0.1, 0.25], ["−0.2", "0.1", "0.2"]),
        ([0.1, np.nextafter(0.1, 1)], ["0.100000000", "0.100000000"]),
        ([], []),
    ],
)
def test_numbers_that_differ_look_different(values: list[float], texts: list[str]) -> None:
    assert words.apart(values) == texts


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.14, "3.1 s"), (75, "1 min 15 s"), (59.99, "60.0 s"), (7300, "2 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999 bytes"), (1_234_567, "1.2 MB"), (5e15, "5,000.0 TB")])
def test_sizes(count: float, text: str) -> None:
    assert words.size(count) == text
