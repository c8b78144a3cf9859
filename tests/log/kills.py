"""Kill real training processes at random moments, and look at what their log says afterwards.

The training is deterministic, checkpoints every few steps and resumes from the newest checkpoint, so
every row that a killed run leaves has a twin in a run that was left alone.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffhook.capture import recorder
from diffhook.integrations.accelerate import DiffHook
from diffhook.log import RunLog, open_log
from diffhook.log import table_writer as writing
from tests.runs import TinyDenoiser, denoising_losses, identified

STEPS, BATCH, SAVE_EVERY = 48, 4, 6
Row = tuple[Any, ...]


def train(folder: Path) -> None:
    """The training script: it knows nothing of kills."""
    torch.set_num_threads(1)
    recorder._LONGEST_WAIT = 600.0  # a crowded test machine is no slow disk: nothing may be given up
    writing.rows_per_shard = lambda dim, dtype: 16  # type: ignore[assignment]
    torch.manual_seed(3)
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = Accelerator(cpu=True)
    hook = DiffHook(accelerator, folder / "log", projection_dim=16, snapshot_every=9, strict=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    data = identified()
    saved = sorted(folder.glob("checkpoint-??"))
    start = 0
    if saved:
        accelerator.load_state(str(saved[-1]))
        start = int(saved[-1].name[-2:])
    for step in range(start, STEPS):
        torch.manual_seed(step)
        ids = torch.randperm(len(data))[:BATCH]
        clean = data[ids]
        noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (BATCH,))
        with hook.step(sample_ids=ids, timesteps=timesteps):
            accelerator.backward(denoising_losses(model, (clean, noise, timesteps)).mean())
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            accelerator.save_state(str(folder / "saving"))
            (folder / "saving").rename(folder / f"checkpoint-{step + 1:02d}")
    accelerator.end_training()


def rows_of(log: RunLog) -> dict[tuple[int, int], Row]:
    """(step, sample) → everything else in the row, bit for bit. No row may be there twice."""
    table = log.train
    if not len(table):
        return {}
    columns = [table[name] for name in table.columns]
    rows = [tuple(value.tobytes() for value in row) for row in zip(*columns, strict=True)]
    found = dict(zip(zip(table["step"].tolist(), table["sample"].tolist(), strict=True), rows, strict=True))
    assert len(found) == len(rows), f"{len(rows) - len(found)} rows are there twice"
    return found


class Harness:
    """Counts what must be zero."""

    def __init__(self, seed: int = 0) -> None:
        torch.set_num_threads(1)  # a fork of many threads is not a process that anyone would start
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("fork")
        self._root = Path(tempfile.mkdtemp(prefix="diffhook-kills-"))
        self.kills = self.runs = self.litter = self.rows_checked = 0
        reference = self._root / "reference"
        began = time.perf_counter()
        self._run(reference, None)
        self._seconds = time.perf_counter() - began
        self.reference = rows_of(open_log(reference / "log"))
        assert len(self.reference) == STEPS * BATCH

    def kill(self, count: int, tell: Callable[[int], None] = lambda done: None) -> None:
        """Kill ``count`` processes; raises AssertionError at the first row that is not right."""
        while self.kills < count:
            folder = self._root / f"run-{self.runs:03d}"
            self.runs += 1
            while self._run(folder, self._random.uniform(0.05, 1.0) * self._seconds):
                self.kills += 1
                self._check(folder)
                tell(self.kills)
            rows = rows_of(open_log(folder / "log"))
            assert rows == self.reference, "a run that was killed and resumed has other rows"
            assert open_log(folder / "log").verify() == []
            assert not list((folder / "log").rglob("*.partial")), "litter of a killed process"
            shutil.rmtree(folder)

    def close(self) -> None:
        shutil.rmtree(self._root)

    def _run(self, folder: Path, seconds: float | None) -> bool:
        """Train, killed after so long. Whether it was."""
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / "saving", ignore_errors=True)
        process = self._context.Process(target=_quiet, args=(folder,))
        process.start()
        process.join(seconds)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), f"training ended with {process.exitcode}"
        return process.exitcode != 0

    def _check(self, folder: Path) -> None:
        """What lies there right after a kill, as a reader finds it."""
        if not (folder / "log" / "zarr.json").exists():
            return  # killed before there was a log
        self.litter += len(list((folder / "log").rglob("*.partial")))
        log = open_log(folder / "log")
        assert log.verify() == []
        rows = rows_of(log)
        wrong = [key for key, row in rows.items() if self.reference.get(key) != row]
        assert not wrong, f"rows unlike the reference's, by (step, sample): {wrong[:5]}"
        self.rows_checked += len(rows)
        saved = max((int(p.name[-2:]) for p in folder.glob("checkpoint-??")), default=0)
        lost = [key for key in self.reference if key[0] < saved and key not in rows]
        assert not lost, f"rows before the checkpoint at step {saved} are lost: {lost[:5]}"
        for snapshot in log.snapshots:
            snapshot.parameters()


def _quiet(folder: Path) -> None:
    """A process of its own, without the hook's words."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    train(folder)
