"""After whatever people do to a log, the rows that can be read are those that led to where the run is."""

from __future__ import annotations

import pytest

from tests.log.histories import check


@pytest.mark.parametrize("part", range(2))
def test_after_any_history_the_readable_rows_are_those_of_the_model(part: int) -> None:
    rows, problems = check(range(1000 * part, 1000 * part + 6))
    assert problems == []
    assert rows > 100
