"""Kill real training processes at random moments, and look at what their log says afterwards.

The training is deterministic, checkpoints every few steps and resumes from the newest checkpoint, so
every row that a killed run leaves has a twin in a run that was left alone: of the training, of probes, and of
queries, which other processes compute between the kills and are killed at as well.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import diffhook
from diffhook.errors import LogError
from diffhook.gradients.tuning import tuner
from diffhook.log import RunLog, open_log
from diffhook.log import table_writer as writing
from tests.runs import SteppedTraining, TinyDenoiser, identified, probed

STEPS, BATCH, SAVE_EVERY = 48, 4, 6
ASKED = STEPS + 1  # the last queries have been answered
LONGEST_LIFE = 2 * SAVE_EVERY  # steps: so that a killed run comes on, however crowded the machine is
HANGS = 300.0  # seconds
Key = tuple[Any, ...]
Row = tuple[Any, ...]


def train(folder: Path, steps_taken: Any) -> None:
    """The training script: it knows nothing of kills.

    Args:
        steps_taken: a counter that the harness watches.
    """
    torch.set_num_threads(1)
    writing.rows_per_shard = lambda dim, dtype: 16  # type: ignore[assignment]
    saved = sorted(folder.glob("checkpoint-??"))
    training = SteppedTraining(folder / "log", snapshot_every=9, strict=True, **probed())
    if saved:
        training.resume(saved[-1])
    for step in range(_step_of(saved), STEPS):
        training.step(step)
        steps_taken.value += 1
        if (step + 1) % SAVE_EVERY == 0:
            training.accelerator.save_state(str(folder / "saving"))
            (folder / "saving").rename(folder / f"checkpoint-{step + 1:02d}")
    training.accelerator.end_training()


def ask(folder: Path, steps_taken: Any) -> None:
    """What a person runs beside it: queries at the snapshots that there are."""
    torch.set_num_threads(1)
    log = open_log(folder / "log")
    if log.snapshots:
        objective = probed()["objective"]
        diffhook.query(
            log, (identified()[:3],), "q", objective=objective, model=TinyDenoiser(), overwrite=True
        )


def _step_of(saved: Sequence[Path]) -> int:
    return max((int(path.name[-2:]) for path in saved), default=0)


def rows_of(log: RunLog) -> list[tuple[Key, Row]]:
    """What each row, of training, probes and queries, and each snapshot is called, and all that is in it, bit
    for bit.

    A key begins with the number of steps after which it must be on the disk if a checkpoint is.
    """
    found: list[tuple[Key, Row]] = []
    for name, table in {"train": log.train, "probe": log.probe, **log.queries}.items():
        if len(table):
            columns = [table[column] for column in table.columns]
            rows = [tuple(value.tobytes() for value in row) for row in zip(*columns, strict=True)]
            names = ("step", "sample", "timestep", "noise_seed", "own_noise")
            keys = zip(*(table[n].tolist() for n in names), strict=True)
            for key, row in zip(keys, rows, strict=True):
                safe = ASKED if name in log.queries else key[0] + (name == "train")
                found.append(((safe, name, *key), row))
    return found + [((s.step, "snapshot"), (s.lr, s.lr_sum, s.parameters())) for s in log.snapshots]


class Harness:
    """Kills, and counts what must be zero. Snapshots count as rows.

    Attributes:
        kills, runs: processes that were killed, and runs that were finished in spite of it.
        killed_queries: how many of the kills hit a process that computed queries.
        rows_checked: rows that were compared with the reference.
        litter: files that kills left half-written.
        corrupt: rows unlike the reference's, files that verify finds damaged, litter that stays.
        lost: rows that a checkpoint or the end of the run vouches for and that are not there.
        doubled: rows that are there twice.
        problems: the same in words.
    """

    def __init__(self, seed: int = 0) -> None:
        torch.set_num_threads(1)  # a fork of many threads is not a process that anyone would start
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("fork")
        self._root = Path(tempfile.mkdtemp(prefix="diffhook-kills-"))
        self.kills = self.killed_queries = self.runs = self.litter = self.rows_checked = 0
        self.corrupt = self.lost = self.doubled = 0
        self.problems: list[str] = []
        self._pace = self._asking = 0.0  # seconds of a step, and of the time before the first; of all queries
        reference = self._root / "reference"
        began = time.perf_counter()
        self._run(train, reference, killed=False)
        self._pace = (time.perf_counter() - began) / STEPS
        began = time.perf_counter()
        self._run(ask, reference, killed=False)
        self._asking = time.perf_counter() - began
        self.reference = dict(rows_of(open_log(reference / "log")))
        assert sum(key[1] == "train" for key in self.reference) == STEPS * BATCH
        assert {key[1] for key in self.reference} == {"train", "probe", "q", "snapshot"}

    def kill(self, count: int, tell: Callable[[int], None] = lambda done: None) -> None:
        """Kill ``count`` processes, and finish the runs that they were."""
        while self.kills < count:
            folder = self._root / f"run-{self.runs:03d}"
            self.runs += 1
            while self._run(train, folder, killed=self.kills < count):
                self._killed(folder)
                if self._has_log(folder) and self._run(ask, folder, killed=self.kills < count):
                    self.killed_queries += 1
                    self._killed(folder)
                tell(self.kills)
            self._run(ask, folder, killed=False)
            self._check(folder, ASKED)
            left = list((folder / "log").rglob("*.partial"))
            self.corrupt += self._count(left, "litter of a killed process")
            shutil.rmtree(folder)

    def close(self) -> None:
        shutil.rmtree(self._root)

    def _killed(self, folder: Path) -> None:
        self.kills += 1
        if self._has_log(folder):
            self.litter += len(list((folder / "log").rglob("*.partial")))
            self._check(folder, _step_of(list(folder.glob("checkpoint-??"))))

    def _has_log(self, folder: Path) -> bool:
        """Or the first process was killed before there was one."""
        return (folder / "log" / "zarr.json").exists()

    def _run(self, script: Callable[[Path, Any], None], folder: Path, killed: bool) -> bool:
        """A process, perhaps killed at a random moment, unless it ends before. Whether it was."""
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / "saving", ignore_errors=True)
        steps_taken = self._context.Value("i", 0, lock=False)
        process = self._context.Process(target=_quiet, args=(script, folder, steps_taken))
        process.start()
        if killed:
            if script is train:
                self._wait_for_a_step(process, steps_taken)
            else:
                process.join(self._random.random() * self._asking)
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
        process.join(HANGS)
        assert process.exitcode in (0, -signal.SIGKILL), f"training ended with {process.exitcode}"
        return process.exitcode != 0

    def _wait_for_a_step(self, process: Any, steps_taken: Any) -> None:
        last = self._random.randrange(LONGEST_LIFE + 1)
        while process.is_alive() and steps_taken.value < last:
            time.sleep(self._pace / 10)
        process.join(self._random.random() * self._pace * (1 if last else STEPS / 4))

    def _check(self, folder: Path, safe: int) -> None:
        """What a reader finds; rows of steps before ``safe`` must be there."""
        try:
            log = open_log(folder / "log")
            damaged, rows = log.verify(), rows_of(log)
        except LogError as error:
            self.corrupt += self._count([error], "the log cannot be read")
            return
        found = dict(rows)
        wrong = [key for key, row in found.items() if self.reference.get(key) != row]
        lost = [key for key in self.reference if key[0] <= safe and key not in found]
        twice = [key for key, count in Counter(key for key, _ in rows).items() if count > 1]
        self.rows_checked += len(rows)
        self.corrupt += self._count(damaged, "damaged") + self._count(wrong, "unlike the reference")
        self.lost += self._count(lost, f"lost before step {safe}")
        self.doubled += self._count(twice, "there twice")

    def _count(self, found: Sequence[Any], what: str) -> int:
        if found:
            self.problems.append(f"run {self.runs - 1}, after {self.kills} kills: {what}: {found[:5]}")
        return len(found)


def _quiet(script: Callable[[Path, Any], None], folder: Path, steps_taken: Any) -> None:
    """A process of its own, without the hook's words.

    It computes in the ways that the first process has found to be fastest, as a user's processes do: in
    others, chosen by timing on a crowded machine, rows differ in their last bits.
    """
    os.environ["DIFFHOOK_TUNING"] = str(folder.parent / "tuning")
    tuner.cache_clear()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    script(folder, steps_taken)
