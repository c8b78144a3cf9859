"""An error of ours at any call of ours reaches no loop and changes no weight."""

from __future__ import annotations

from tests.integrations.injection import trials


def test_no_error_of_ours_reaches_the_loop_or_changes_its_weights() -> None:
    assert trials(4, seed=0) == []
