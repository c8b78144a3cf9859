"""The same result whatever the memory, the scheduler, and the fate of its workers."""

from __future__ import annotations

import io
import os
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import diffhook
from diffhook import words
from diffhook.analysis.cost import Cost
from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import Division, add_rows, distinct_samples, grouped
from diffhook.analysis.sample_sums import Whole
from diffhook.log import LogWriter, Snapshot
from tests.analysis.synthetic import SAMPLES, Synthetic, config, synthetic
from tests.waiting import wait_until

TIGHT = 512  # bytes: every sum goes through files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return synthetic(tmp_path_factory.mktemp("scale") / "log")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> diffhook.RunLog:
    """A log of many shards, 600 samples seen in shuffled order."""
    path = tmp_path_factory.mktemp("large") / "log"
    return many_rows(path, rows=40_000, samples=600)


def many_rows(path: Path, rows: int, samples: int, dim: int = 512) -> diffhook.RunLog:
    made = config()
    made["identity"]["projection"] = {"dim": dim, "seed": 0, "kind": "sketch"}
    rng = np.random.default_rng(0)
    common = {"timestep": np.float32, "loss": np.float32, "weight": np.float32, "lr": np.float32}

    def batch(count: int, first: int, step: int, ids: Any) -> dict[str, np.ndarray]:
        values = rng.standard_normal((count, dim)).astype(np.float32)
        return {
            "sample": np.asarray(ids, np.int64),
            "step": np.full(count, step, np.int64),
            "noise_seed": np.zeros(count, np.int64),
            "grad_norm": rng.uniform(0.5, 2, count).astype(np.float32),
            "projection": (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16),
            **{name: np.ones(count, dtype) for name, dtype in common.items()},
        }

    writer = LogWriter(path, made)
    for first in range(0, rows, 1000):
        writer.put("train", batch(1000, first, first // 1000, rng.integers(0, samples, 1000)))
    for step in (10, 30):
        writer.snapshot(Snapshot(step, 0.1, 0.1, writer.session), b"")
    writer.close()
    from diffhook.log.table_writer import TableWriter

    queries = TableWriter(diffhook.open_log(path).writable_store(), "queries/q/rank-0000", dim, "float16")
    for step in (10, 30):
        queries.append({**batch(5, 0, step, np.arange(5)), "own_noise": np.ones(5, np.int8)})
    queries.flush()
    queries.describe({"objective": {}, "snapshots": [[10, 0], [30, 0]], "against": ["train"]})
    return diffhook.open_log(path)


@pytest.mark.parametrize("method", ["retrac", "cosine", "trak", "whitened-retrac"])
def test_sums_through_files_equal_sums_in_memory(made: Synthetic, method: str) -> None:
    roomy = diffhook.influence(made.log, "new", method, "train")
    tight = diffhook.influence(made.log, "new", method, "train", execution=Execution(memory=TIGHT))
    assert roomy.cost.spilled == 0
    assert tight.cost.spilled > 0
    np.testing.assert_allclose(tight.values, roomy.values, rtol=1e-5, atol=1e-7 * np.abs(roomy.values).max())
    assert tight.errors is not None
    assert roomy.errors is not None
    np.testing.assert_allclose(tight.errors, roomy.errors, rtol=1e-3, atol=1e-6 * roomy.errors.max())


def test_a_top_that_streams_is_the_top_of_the_whole_matrix(large: diffhook.RunLog) -> None:
    whole = diffhook.influence(large, "q")
    order = np.argsort(-whole.values, axis=1, kind="stable")[:, :7]
    streamed = diffhook.influence(large, "q", execution=Execution(memory=1 << 16))
    found = streamed.top(7)
    assert "values" not in vars(streamed), "the top must not compute the whole matrix"
    assert (found.sample_ids == whole.sample_ids[order]).all()
    assert (whole.top(7).sample_ids == found.sample_ids).all()
    low = diffhook.influence(large, "q", execution=Execution(memory=1 << 16)).top(7, opponents=True)
    assert (low.sample_ids == whole.top(7, opponents=True).sample_ids).all()


def test_self_influence_reads_every_block_once(
    large: diffhook.RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffhook.log import Table

    expected = diffhook.self_influence(large, "tracin")
    read: list[Any] = []
    plain = Table.read

    def counting(self: Table, block: Any, column: str) -> Any:
        if column == "projection":
            read.append(block)
        return plain(self, block, column)

    monkeypatch.setattr(Table, "read", counting)
    found = diffhook.self_influence(large, "tracin", execution=Execution(memory=1 << 20))
    assert len(read) == len(set(read)) == len(list(large.train.blocks()))
    assert (found.sample_ids == expected.sample_ids).all()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_peak_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    peaks = []
    for rows in (40_000, 160_000):
        log = many_rows(tmp_path / str(rows), rows, samples=600, dim=128)
        len(log.train)
        scores = diffhook.influence(log, "q", execution=Execution(scheduler="synchronous"))
        tracemalloc.start()
        scores.top(5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert peaks[-1] <= scores.cost.memory, "more than was said beforehand"
    assert peaks[1] < 1.25 * peaks[0]


def test_threads_and_synchronous_agree_to_the_bit(large: diffhook.RunLog) -> None:
    for memory in (1 << 30, 1 << 18):
        for method in ("trak", "whitened-retrac"):
            one = diffhook.influence(
                large, "q", method, execution=Execution(scheduler="synchronous", memory=memory)
            )
            other = diffhook.influence(
                large, "q", method, execution=Execution(scheduler="threads", memory=memory)
            )
            assert (one.values == other.values).all()
            np.testing.assert_array_equal(one.errors, other.errors)


def test_samples_are_listed_once_in_order(large: diffhook.RunLog) -> None:
    found = distinct_samples(large.train, Execution())
    assert (found == np.unique(large.train["sample"])).all()


def test_every_position_belongs_to_one_part() -> None:
    for count, memory in ((1, 10), (7, 100), (1000, 4000), (1000, 10**9)):
        plan = Division.make(count, 3, Execution(scheduler="synchronous", memory=memory))
        covered = [i for start, stop in plan.bounds for i in range(start, stop)]
        assert covered == list(range(count))


def test_the_order_of_sums_is_that_of_the_rows(made: Synthetic) -> None:
    def ones(table: Any, block: Any) -> Any:
        sample = np.searchsorted(SAMPLES, table.read(block, "sample"))
        return add_rows(sample, np.ones((len(sample), 2)))

    for memory in (1 << 30, 1):
        execution = Execution(scheduler="synchronous", memory=memory)
        plan = Division.make(len(SAMPLES), 2, execution)
        assert (grouped(made.log.train, ones, plan, Whole(), execution) == 10).all()


# ── a cluster ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "30s"}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_a_cluster_gives_the_same_to_the_bit(large: diffhook.RunLog, client: Any) -> None:
    """Where both multiply matrices with as many threads: of more, BLAS adds up in another order."""
    for memory in (1 << 30, 1 << 18):
        with threadpool_limits(1):  # as dask's workers have it
            here = diffhook.influence(large, "q", execution=Execution(memory=memory))
        there = diffhook.influence(large, "q", execution=Execution(memory=memory, client=client))
        assert (here.top(9).sample_ids == there.top(9).sample_ids).all()
        np.testing.assert_array_equal(here.values, there.values)


def test_a_cluster_tells_how_far_it_has_come(client: Any) -> None:
    from dask import delayed

    from diffhook.analysis.cluster import follow

    told: list[tuple[int, int]] = []
    finished = threading.Event()

    def draw(done: int, total: int) -> None:
        told.append((done, total))
        if done == total:
            finished.set()

    future = client.compute(delayed(sum)([delayed(abs)(-i) for i in range(6)]))
    follow(future, draw)
    assert future.result() == 15
    assert finished.wait(20), f"it stopped at {told[-1:]}"
    assert all(0 <= done <= total for done, total in told)


def test_a_bar_is_drawn_for_threads_and_for_a_cluster(
    large: diffhook.RunLog, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from diffhook.analysis import execution

    bars: list[Progress] = []

    def made(enabled: bool = True) -> Progress:
        bars.append(Progress(console=Console(file=io.StringIO()), disable=not enabled))
        return bars[-1]

    monkeypatch.setattr(execution, "progress_bar", made)
    for where in (None, client):
        diffhook.influence(large, "q", execution=Execution(client=where, progress=True)).top(3)
        assert bars[-1].tasks[0].description == "scoring rows"
        wait_until(lambda: bars[-1].finished)


@pytest.mark.parametrize("memory", [1 << 30, 1 << 18], ids=["tree", "files"])
def test_a_killed_worker_does_not_change_the_result(
    large: diffhook.RunLog, client: Any, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    expected = diffhook.influence(large, "q", "tracin", execution=Execution(memory=memory)).top(9)
    client.wait_for_workers(2)
    victim = next(iter(client.run(os.getpid).values()))
    killed = threading.Event()

    def kill_when_busy() -> None:
        while not any(client.processing().values()):
            pass
        os.kill(victim, signal.SIGKILL)
        killed.set()

    scores = diffhook.influence(large, "q", "tracin", execution=Execution(memory=memory, client=client))
    assassin = threading.Thread(target=kill_when_busy)
    assassin.start()
    found = scores.top(9)
    assassin.join()
    assert killed.is_set()
    assert (found.sample_ids == expected.sample_ids).all()
    assert (found.scores == expected.scores).all()


def test_what_a_pass_takes_is_told_in_the_units_of_everything_else() -> None:
    told = str(Cost(rows=1_200, read=1_234_567, memory=999_000_000, spilled=5_000))
    assert told == (
        f"reads 1,200 rows ({words.size(1_234_567)}), holds at most {words.size(999_000_000)}, "
        f"{words.size(5_000)} at most through temporary files"
    )
