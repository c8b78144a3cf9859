"""A measurement may die at any instant, alone or beside another: started again, it does what is missing."""

from __future__ import annotations

import sys

import pytest

from tests.checkpoints.kills import Harness


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_measurements_leave_no_wrong_lost_or_doubled_row() -> None:
    harness = Harness(seed=1)
    harness.kill(3)
    harness.close()
    assert harness.problems == []
    assert (harness.doubled, harness.lost, harness.wrong) == (0, 0, 0)
    assert harness.kills >= 3
    assert harness.rows_checked >= len(harness.reference)
