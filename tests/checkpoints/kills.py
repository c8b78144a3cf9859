"""Kill processes that measure checkpoints, alone and in pairs, and look at what their log says afterwards."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffhook
from diffhook.capture.checkpoints import measurement
from diffhook.log import RunLog, open_log
from diffhook.log import table_writer as writing
from tests.runs import SCHEDULER, TinyDenoiser, identified

SAMPLES, CHECKPOINTS = 40, 3
GRID = diffhook.Grid(3, replicates=2)
HANGS = 300.0  # seconds
Key = tuple[int, int, int]


def save_checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    for step in range(1, CHECKPOINTS + 1):
        torch.save(TinyDenoiser().state_dict(), folder / f"checkpoint-{step}.pt")


def measure(folder: Path, log: Path) -> None:
    """What a person runs. Rows come in the smallest portions, so that a kill finds a sample half done."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    writing.rows_per_shard = lambda dim, dtype: 16  # type: ignore[assignment]
    measurement._FLUSH = 0.0
    diffhook.from_checkpoints(
        TinyDenoiser(), str(folder / "checkpoint-*.pt"), [(image,) for image in identified(SAMPLES)],
        diffhook.DiffusionObjective(SCHEDULER), log, probe=diffhook.Probe(None, GRID, batch_size=4),
        projection_dim=16,
    )  # fmt: skip


def rows_of(log: RunLog) -> list[tuple[Key, np.ndarray]]:
    """(step, sample, noise) → norm, loss and projection of each row."""
    keys = zip(*(log.probe[name].tolist() for name in ("step", "sample", "noise_seed")), strict=True)
    values = np.column_stack([log.probe["grad_norm"], log.probe["loss"], log.probe["projection"]])
    return list(zip(keys, values, strict=True))


class Harness:
    """Kills, and counts what must be zero.

    Attributes:
        kills, runs: processes that were killed, and logs that were finished in spite of it.
        cut_samples: kills that left a sample with some of its rows.
        doubled, lost, wrong: rows that are there twice, are not there in the end, are unlike the reference's.
        problems: the same, and what verify finds, in words.
    """

    def __init__(self, seed: int = 0) -> None:
        torch.set_num_threads(1)  # a fork of many threads is not a process that anyone would start
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("fork")
        self._root = Path(tempfile.mkdtemp(prefix="diffhook-checkpoint-kills-"))
        save_checkpoints(self._root)
        began = time.perf_counter()
        self._run(self._root / "reference", [None])
        self._seconds = time.perf_counter() - began
        self.reference = dict(rows_of(open_log(self._root / "reference")))
        assert len(self.reference) == SAMPLES * CHECKPOINTS * GRID.rows
        self.kills = self.runs = self.cut_samples = self.rows_checked = 0
        self.doubled = self.lost = self.wrong = 0
        self.problems: list[str] = []

    def kill(self, count: int, tell: Callable[[int], None] = lambda done: None) -> None:
        """Kill ``count`` processes, and finish the logs that they were at."""
        while self.kills < count:
            log = self._root / f"log-{self.runs}"
            self.runs += 1
            while self.kills < count:
                together = self._random.choice((1, 1, 2))
                lives = [self._random.random() * self._seconds / 2 for _ in range(together)]
                killed = self._run(log, lives)
                self.kills += killed
                tell(self.kills)
                if (log / "zarr.json").exists():
                    self._check(open_log(log), whole=False)
                if killed < together:  # one came to the end
                    break
            self._run(log, [None, None])
            self._check(open_log(log), whole=True)
            shutil.rmtree(log)

    def close(self) -> None:
        shutil.rmtree(self._root)

    def _run(self, log: Path, lives: list[Any]) -> int:
        """Processes that live so many seconds, or as long as they want. How many were killed."""
        processes = [self._context.Process(target=measure, args=(self._root, log)) for _ in lives]
        for process in processes:
            process.start()
        began = time.perf_counter()
        for life, process in sorted(zip(lives, processes, strict=True), key=lambda pair: pair[0] or HANGS):
            process.join(HANGS if life is None else max(began + life - time.perf_counter(), 0))
            if life is not None and process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join(HANGS)
            assert process.exitcode in (0, -signal.SIGKILL), f"a process ended with {process.exitcode}"
        return sum(process.exitcode != 0 for process in processes)

    def _check(self, log: RunLog, *, whole: bool) -> None:
        rows = rows_of(log) if len(log.probe) else []
        found = dict(rows)
        self.rows_checked += len(rows)
        samples = Counter(key[:2] for key in found)
        self.cut_samples += any(count < GRID.rows for count in samples.values())
        twice = len(rows) - len(found)
        lost = len(self.reference) - len(found) if whole else 0
        wrong = sum(
            key not in self.reference or not np.allclose(row, self.reference[key], rtol=1e-5, atol=5e-4)
            for key, row in found.items()
        )
        self.doubled, self.lost, self.wrong = self.doubled + twice, self.lost + lost, self.wrong + wrong
        damage = log.verify()
        if twice or lost or wrong or damage:
            self.problems.append(
                f"after {self.kills} kills: {twice} twice, {lost} lost, {wrong} wrong; {damage[:3]}"
            )
