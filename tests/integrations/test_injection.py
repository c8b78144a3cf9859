"""An error of ours at any call of ours reaches no loop, changes no weight or row and leaves nothing."""

from __future__ import annotations

from tests.integrations.injection import trials


def test_no_error_of_ours_reaches_the_loop_or_changes_its_weights_or_a_row() -> None:
    done = trials(20, seed=0)
    assert done.wrong == []
    assert done.rows == []
