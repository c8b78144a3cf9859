"""What holds of every store that a log can lie in: tests for a class of your own to inherit.

    class TestMine(StoreContract):
        def open(self, folder):
            return Mine(folder)

pytest runs them. :func:`some_rows` and :data:`CONFIG` serve tests that write a log.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from diffhook.appearance import COLUMNS
from diffhook.log.compaction import compact
from diffhook.log.reader import open_log
from diffhook.log.schema import Rows
from diffhook.log.snapshots import Snapshot
from diffhook.log.store import Location
from diffhook.log.writer import LogWriter

DIM = 8
CONFIG: dict[str, Any] = {
    "identity": {
        "projection": {"dim": DIM, "seed": 0, "kind": "sketch"},
        "parameters": [["weight", [3, 4]]],
        "model": {"class": "Tiny", "config": {"width": 3}},
        "objective": None,
    },
    "versions": {},
}


def some_rows(count: int, first: int = 0, step: int | None = None) -> Rows:
    """Rows of samples ``first``, ``first + 1`` …, always the same; four to a step unless it is given."""
    rng = np.random.default_rng(first)
    sample = np.arange(first, first + count)
    return {
        "sample": sample,
        "step": sample // 4 if step is None else np.full(count, step),
        "timestep": rng.integers(0, 1000, count).astype(np.float32),
        "noise_seed": np.full(count, -1),
        "replicate": (sample % 3).astype(np.int16),
        "own_noise": (sample % 2).astype(np.int8),
        "lr": np.full(count, 0.1, np.float32),
        "loss": rng.random(count, np.float32),
        "weight": np.full(count, 0.25, np.float32),
        "grad_norm": rng.random(count, np.float32),
        "role": (sample % 2).astype(np.int8),
        **{name: rng.random(count, np.float32) for name in (*COLUMNS, "label_contrast")},
        "label": sample % 5,
        "better_label": sample % 7,
        "projection": rng.standard_normal((count, DIM)).astype(np.float16),
    }


class StoreContract(ABC):
    """Give your store by :meth:`open`."""

    @abstractmethod
    def open(self, folder: Path) -> Location:
        """The store at ``folder``, or at a place of its own for it: each call as another process would open
        it, with what was written before."""

    def test_all_that_is_written_is_read(self, tmp_path: Path) -> None:
        writer = LogWriter(self.open(tmp_path), CONFIG)
        written = [some_rows(4, 4 * step) for step in range(6)]
        for rows in written:
            writer.put("train", rows)
        writer.snapshot(Snapshot(6, 0.1, 0.6, writer.session), b"weights")
        writer.alert({"step": 5, "kind": "test", "message": "näher"})
        writer.record("summary.json", {"rows": 24})
        writer.close()
        log = open_log(self.open(tmp_path))
        self._assert_holds(log.train, written)
        assert [snapshot.parameters() for snapshot in log.snapshots] == [b"weights"]
        assert [alert["message"] for alert in log.alerts()] == ["näher"]
        assert log.verify() == []

    def test_a_reader_sees_what_is_flushed_while_training_goes_on(self, tmp_path: Path) -> None:
        writer = LogWriter(self.open(tmp_path), CONFIG)
        for step in range(3):
            writer.put("train", some_rows(4, 4 * step))
            writer.flush()
            assert len(open_log(self.open(tmp_path)).train) == 4 * (step + 1)
        writer.close()

    def test_a_resumed_run_supersedes_the_rows_after_its_checkpoint(self, tmp_path: Path) -> None:
        for start, stop in ((0, 4), (2, 5)):
            writer = LogWriter(self.open(tmp_path), CONFIG, start_step=start)
            for step in range(start, stop):
                writer.put("train", some_rows(4, 4 * step, step))
            writer.close()
        self._assert_holds(open_log(self.open(tmp_path)).train, [some_rows(4, 4 * step) for step in range(5)])

    def test_rows_survive_compaction_into_it(self, tmp_path: Path) -> None:
        writer = LogWriter(self.open(tmp_path / "parts"), CONFIG)
        written = [some_rows(4, 4 * step) for step in range(6)]
        for rows in written:
            writer.put("train", rows)
            writer.flush()
        writer.close()
        compact(self.open(tmp_path / "parts"), self.open(tmp_path / "whole"), progress=False)
        whole = open_log(self.open(tmp_path / "whole"))
        self._assert_holds(whole.train, written)
        assert whole.verify() == []

    @staticmethod
    def _assert_holds(table: Any, written: list[Rows]) -> None:
        for name in written[0]:
            np.testing.assert_array_equal(table[name], np.concatenate([rows[name] for rows in written]), name)
