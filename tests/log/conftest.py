"""What holds for every test of the log."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _disk_without_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is brought to the disk for good, which takes most of the time. Tests of power cuts say instead
    what the disk would have done."""
    monkeypatch.setattr("diffhook.log.durable._sync", list)
