"""Which rows count after several sessions and a repair: the same as row by row, a shard at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffhook.log import LogWriter, RunLog, open_log
from diffhook.log.mark import put_attributes
from diffhook.log.rank import RankGroup
from diffhook.log.testing import CONFIG, some_rows

SHARD = 16
# (rows, step of the first; 4 rows a step): the second supersedes within, the third all of the second.
SESSIONS = [(70, 0), (40, 9), (24, 9), (50, 15)]
LOST = [(3, 5), (16, 32), (40, 44), (130, 141)]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffhook.log.table_writer.rows_per_shard", lambda dim, dtype: SHARD)


def written(path: Path, sessions: list[tuple[int, int]], lost: list[tuple[int, int]]) -> RunLog:
    for index, (count, first_step) in enumerate(sessions):
        writer = LogWriter(path, CONFIG, start_step=first_step if index else 0)
        rows = some_rows(count, first=1000 * index)
        writer.put("train", {**rows, "step": first_step + np.arange(count) // 4})
        writer.close()
    log = open_log(path)
    (group,) = log.train.groups
    put_attributes(log.writable_store(), group.path, {**group.attributes, "lost": [list(r) for r in lost]})
    return open_log(path)


def by_row(group: RankGroup) -> np.ndarray:
    step = group.read("step", 0, group.committed)
    valid = [
        not any(start <= row < stop for start, stop in group.lost)
        and all(step[row] < s["start_step"] for s in group.sessions[1:] if row < s["first_row"])
        for row in range(group.committed)
    ]
    return np.array(valid, np.bool_)


@pytest.mark.parametrize(
    ("sessions", "lost"),
    [
        (SESSIONS, LOST),
        (SESSIONS, []),
        (SESSIONS[:2], [(0, 10**9)]),
        (SESSIONS[:1], LOST[:3]),
        ([(64, 0), (32, 0)], []),
    ],
    ids=["both", "sessions", "all lost", "lost", "all superseded"],
)
def test_rows_that_count_are_those_that_count_one_by_one(
    tmp_path: Path, sessions: list[tuple[int, int]], lost: list[tuple[int, int]]
) -> None:
    table = written(tmp_path, sessions, lost).train
    (group,) = table.groups
    expected = by_row(group)
    np.testing.assert_array_equal(group.valid, expected)
    assert len(table) == group.count == expected.sum()
    edges = range(0, group.committed + 1, 7)
    for start in edges:
        for stop in (s for s in edges if s >= start):
            np.testing.assert_array_equal(group.valid_in(start, stop), expected[start:stop])
    for block in table.blocks():
        assert block.offset == expected[: block.start].sum()
        stored = group.read("sample", block.start, block.stop)
        np.testing.assert_array_equal(table.read(block, "sample"), stored[expected[block.start : block.stop]])


def test_several_sessions_are_read_a_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = written(tmp_path, SESSIONS, LOST).train
    (group,) = table.groups
    read: list[tuple[str, int, int]] = []
    plain = RankGroup.read

    def noting(self: RankGroup, column: str, start: int, stop: int, *rest: Any) -> Any:
        read.append((column, start, stop))
        return plain(self, column, start, stop, *rest)

    monkeypatch.setattr(RankGroup, "read", noting)
    total = sum(len(table.read(block, "loss")) for block in table.blocks())
    assert total == len(table)
    assert max(stop - start for _, start, stop in read) == SHARD
    assert "valid" not in vars(group)
    of_steps = len([column for column, *_ in read if column == "step"])
    for _ in range(3):
        for block in table.blocks():
            table.read(block, "loss")
    again = len([column for column, *_ in read if column == "step"]) - of_steps
    assert again == 0, "which rows count is found out once"
