"""The same log in an icechunk repository, a commit for every flush."""

from __future__ import annotations

from typing import Any

import icechunk
import pytest

from diffhook.log import LogWriter, open_log
from diffhook.log.icechunk import IcechunkStore
from diffhook.log.testing import CONFIG, some_rows
from tests.log.test_s3 import check, write


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)
    return icechunk.Repository.create(icechunk.in_memory_storage())


def test_a_log_is_written_resumed_and_read(repository: Any) -> None:
    write(IcechunkStore(repository))
    check(IcechunkStore(repository))


def test_every_flush_is_a_commit_and_nothing_else_is_seen(repository: Any) -> None:
    writer = LogWriter(IcechunkStore(repository), CONFIG)
    writer.put("train", some_rows(5))
    writer.flush()
    before = len(list(repository.ancestry(branch="main")))
    writer.put("train", some_rows(5, 5))
    assert len(open_log(IcechunkStore(repository)).train) == 5
    writer.flush()
    assert len(list(repository.ancestry(branch="main"))) == before + 1
    assert len(open_log(IcechunkStore(repository)).train) == 10
    writer.close()
