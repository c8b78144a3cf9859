"""The preconditioner beside a snapshot's parameters: kept, copied, checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffhook.errors import LogError
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.compaction import compact
from tests.analysis.synthetic import config


@pytest.fixture
def log(tmp_path: Path) -> Path:
    writer = LogWriter(tmp_path / "log", config())
    writer.snapshot(Snapshot(5, 0.1, 0.5), b"five", b"factors")
    writer.snapshot(Snapshot(9, 0.1, 0.4), b"nine")
    writer.close()
    return tmp_path / "log"


def test_it_is_kept_where_it_was_given_and_copies_keep_it(log: Path, tmp_path: Path) -> None:
    compact(log, tmp_path / "copy")
    for place in (log, tmp_path / "copy"):
        five, nine = open_log(place).snapshots
        assert (five.parameters(), five.preconditioner()) == (b"five", b"factors")
        assert (nine.parameters(), nine.preconditioner()) == (b"nine", None)
        assert five.details == nine.details == {}


def test_damage_to_it_is_found(log: Path) -> None:
    path = log / "snapshots/step-00000005/preconditioner.safetensors"
    path.write_bytes(b"Factors")
    with pytest.raises(LogError, match=r"preconditioner\.safetensors is damaged"):
        open_log(log).snapshots[0].preconditioner()
    assert any("preconditioner.safetensors is damaged" in line for line in open_log(log).verify())
    path.unlink()
    assert any("has lost its preconditioner" in line for line in open_log(log).verify())
