"""Models trained on subsets, in several processes, every one recorded when it is done."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from diffhook.console import progress_bar
from diffhook.errors import ConfigurationError

Train = Callable[[npt.NDArray[np.int64]], Any]  # samples in the order to train on → a model
Measure = Callable[[Any], npt.ArrayLike]  # model → (Q,) losses of the queries
Job = tuple[npt.NDArray[np.int64], int]  # subset, seed


@dataclass(frozen=True)
class Retrained:
    """What retrained models said.

    Attributes:
        subsets: M arrays of ids, in the order in which training was told of them.
        seeds: of each subset's trainings.
        losses: (seeds, M, Q) of the queries.
    """

    subsets: list[npt.NDArray[np.int64]]
    seeds: list[int]
    losses: npt.NDArray[np.float64]


def half_subsets(
    samples: int | npt.NDArray[np.int64], count: int = 64, *, share: float = 0.5, seed: int = 0
) -> list[npt.NDArray[np.int64]]:
    """Random subsets of 0 … samples − 1, or of the ids, in random order: the order to train on.

    Raises:
        ConfigurationError: a share that leaves nothing in or out.
    """
    ids = ids_of(samples)
    size = round(len(ids) * share)
    if not 0 < size < len(ids):
        raise ConfigurationError(
            f"a share of {share} of {len(ids)} samples is {size}; expected some, not all"
        )
    rng = np.random.default_rng(seed)
    return [rng.permutation(ids)[:size] for _ in range(count)]


def ids_of(samples: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 … samples − 1, or the ids themselves."""
    return np.arange(samples) if isinstance(samples, int | np.integer) else np.asarray(samples, np.int64)


def retrain(
    train: Train,
    measure: Measure,
    subsets: Sequence[npt.ArrayLike],
    *,
    seeds: Sequence[int] = (0,),
    queries: int | None = None,
    record: str | Path | None = None,
    processes: int = 1,
    progress: bool = True,
) -> Retrained:
    """Train a model on each subset, once per seed, and measure the queries.

    Python's, numpy's and torch's random states are seeded before each training. With a record, a
    line of JSON per training, finished ones are not run again. When a training fails, those that run
    beside it are still recorded, and the error is raised after that.

    Args:
        train: a subset's ids, in order → model.
        measure: model → (Q,) losses. With processes > 1, both must be importable by name.
        queries: Q, where known: a record of other queries is then found before anything is trained.
        record: the file. It belongs to one ``train`` and one ``measure``: it knows subsets and seeds, not
            what was done with them. After a change of either, name another file.
        processes: trainings at the same time.

    Raises:
        ConfigurationError: the record is of other queries (which otherwise the first training shows), or
            damaged; measure gives another number of losses. Nothing is recorded then.
    """
    ordered = [np.asarray(subset, np.int64) for subset in subsets]
    jobs = [(subset, int(seed)) for seed in seeds for subset in ordered]
    known = _recorded(record, queries) if record else ()
    done = {_key(subset, seed): losses for subset, seed, losses in known}
    waiting = [job for job in jobs if _key(*job) not in done]
    with progress_bar(progress) as bar:
        task = bar.add_task("training on subsets", total=len(jobs), completed=len(jobs) - len(waiting))

        def finished(job: Job, losses: list[float]) -> None:
            expected = queries or len(next(iter(done.values()), losses))
            if len(losses) != expected:
                before = f", as in {record}: name another file" if record and queries is None else ""
                raise ConfigurationError(f"measure gave {len(losses)} losses; expected {expected}{before}")
            done[_key(*job)] = losses
            if record:
                _append(record, *job, losses)
            bar.advance(task)

        _run(train, measure, waiting, processes, finished)
    table = np.array([done[_key(*job)] for job in jobs])
    return Retrained(ordered, list(seeds), table.reshape(len(seeds), len(ordered), -1))


def read_retrained(record: str | Path) -> Retrained:
    """What :func:`retrain` recorded, subsets that all seeds have.

    Raises:
        ConfigurationError: there is nothing in the record, or it is of several evaluations.
    """
    found: dict[int, dict[tuple[int, ...], list[float]]] = {}
    for subset, seed, losses in _recorded(record):
        found.setdefault(seed, {})[tuple(subset.tolist())] = losses
    if not found:
        raise ConfigurationError(f"{record} records no training: expected a file that retrain() wrote")
    first, *others = found.values()
    common = [subset for subset in first if all(subset in other for other in others)]
    table = np.array([[of_seed[subset] for subset in common] for of_seed in found.values()])
    return Retrained([np.array(subset, np.int64) for subset in common], list(found), table)


def _run(
    train: Train,
    measure: Measure,
    jobs: list[Job],
    processes: int,
    finished: Callable[[Job, list[float]], None],
) -> None:
    """After a failure nothing begins, what runs is still recorded, and then the first error is raised."""
    if processes <= 1:
        for job in jobs:
            finished(job, _train_one(train, measure, *job))
        return
    failure: BaseException | None = None
    waiting = iter(jobs)
    running: dict[Future[list[float]], Job] = {}
    # Spawned: a forked process would inherit torch's threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        while True:
            try:
                # No more than run: what the pool has queued, it cannot be told to leave.
                for job in islice(waiting, 0 if failure else processes - len(running)):
                    running[pool.submit(_train_one, train, measure, *job)] = job
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finished(running.pop(future), future.result())
            except BaseException as error:  # Ctrl-C too: hours of training end in this loop
                failure = failure or error
    if failure:
        raise failure


def _train_one(train: Train, measure: Measure, subset: npt.NDArray[np.int64], seed: int) -> list[float]:
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return [float(loss) for loss in np.asarray(measure(train(subset)), np.float64).reshape(-1)]


def _key(subset: npt.NDArray[np.int64], seed: int) -> tuple[bytes, int]:
    return np.ascontiguousarray(subset, np.int64).tobytes(), seed


def _recorded(
    record: str | Path, queries: int | None = None
) -> Iterator[tuple[npt.NDArray[np.int64], int, list[float]]]:
    path = Path(record)
    # After the last newline: nothing, or what was being written when the process was killed.
    *lines, _ = path.read_text().split("\n") if path.exists() else ("",)
    for number, line in enumerate(lines, 1):
        place = f"{record}, line {number}"
        try:
            entry = json.loads(line)
            subset, seed = np.array(entry["subset"], np.int64), int(entry["seed"])
            losses = [float(value) for value in entry["losses"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{place}: not a training that was recorded") from error
        queries = queries or len(losses)
        if len(losses) != queries:
            raise ConfigurationError(
                f"{place}: {len(losses)} losses; expected {queries}: it is of another evaluation, name "
                "another file"
            )
        yield subset, seed, losses


def _append(record: str | Path, subset: npt.NDArray[np.int64], seed: int, losses: list[float]) -> None:
    line = json.dumps({"seed": seed, "losses": losses, "subset": subset.tolist()}) + "\n"
    with open(record, "a+b") as file:
        _cut_torn_line(file)
        file.write(line.encode())


def _cut_torn_line(file: IO[bytes]) -> None:
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
