"""A process may die at any instant: what is in the log afterwards is right, and resuming loses nothing."""

from __future__ import annotations

import sys

import pytest

from tests.log.kills import Harness


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_training_leaves_no_wrong_lost_or_doubled_row() -> None:
    harness = Harness(seed=1)
    harness.kill(3)
    harness.close()
    assert harness.problems == []
    assert (harness.corrupt, harness.lost, harness.doubled) == (0, 0, 0)
    assert harness.kills >= 3
    assert harness.rows_checked >= len(harness.reference)
