"""After whatever people do to a log, the rows that can be read are those that led to where the run is."""

from __future__ import annotations

from tests.log.histories import check


def test_after_any_history_the_readable_rows_are_those_of_the_model() -> None:
    """Of a few; examples/benchmarks/histories.py lives through two thousand."""
    rows, problems = check(range(5))
    assert problems == []
    assert rows > 100
