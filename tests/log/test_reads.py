"""How often a store is asked: over a network every read costs a round trip."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore, WrapperStore

from diffhook.analysis import bias
from diffhook.log import LogWriter, Snapshot, open_log
from diffhook.log.table_writer import TableWriter
from diffhook.log.testing import CONFIG, DIM, some_rows

SETS = 5


class CountingStore(WrapperStore[Store]):
    """Passes everything on, and counts what is asked: how, and for which key."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.asked: Counter[tuple[str, str]] = Counter()

    async def get(self, key: str, *args: Any, **options: Any) -> Buffer | None:
        self.asked["get", key] += 1
        return await self._store.get(key, *args, **options)

    async def exists(self, key: str) -> bool:
        self.asked["exists", key] += 1
        return await self._store.exists(key)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        self.asked["list", prefix] += 1
        return self._store.list_dir(prefix)

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        self.asked["list all", prefix] += 1
        return self._store.list_prefix(prefix)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Two processes and three sessions, whose branches cut through shards; five sets of queries."""
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: 16)
    made = MemoryStore()
    for start in (0, 4, 8):
        for rank in (0, 1):
            writer = LogWriter(made, CONFIG, rank=rank, processes=2, start_step=start)
            for step in range(start, start + 8):
                writer.put("train", some_rows(4, 4 * step, step=step))
            if rank == 0:
                writer.snapshot(Snapshot(start + 4, 0.1, 0.1), b"weights")
                writer.put("probe", some_rows(4, step=start + 4))
            writer.close()
    at = [[snapshot.step, snapshot.session] for snapshot in open_log(made).snapshots]
    for number in range(SETS):
        queries = TableWriter(made, f"queries/q{number}/rank-0000", DIM, "float16")
        queries.append(some_rows(6, step=12))
        queries.flush()
        queries.describe({"objective": {}, "against": ["train", "probe"], "snapshots": at})
    return made


def test_many_questions_read_each_file_once_and_projections_once_a_pass(store: MemoryStore) -> None:
    """A scalar column is read by shards and, for ranking and quantiles, whole: three times at most."""
    counting = CountingStore(store)
    report = bias(open_log(counting))
    assert len({found.queries for found in report.generality}) == SETS
    scores = len(report.generality)
    for (how, key), count in counting.asked.items():
        if "/projection/c/" in key:
            passes = 2 * scores + 5  # a shard that is no whole one takes two reads: its index, and its rows
            assert count <= 2 * passes, key
        else:
            assert count <= (3 if "/c/" in key else 1), (how, key, count)


def test_a_log_that_was_opened_again_and_again_is_read_as_often(store: MemoryStore) -> None:
    counting = CountingStore(store)
    log = open_log(counting)
    for _ in range(3):
        assert len(log.train), len(log.queries) == SETS
        assert log.snapshots
        assert log.names() == {}
    assert max(counting.asked.values()) == 1
    log.refresh()
    assert len(log.train)
    assert counting.asked["get", "train/rank-0000/zarr.json"] == 2, "refresh looks again"
