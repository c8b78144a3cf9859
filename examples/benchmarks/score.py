"""What scoring costs, against numpy on the same numbers, and how it grows with the rows of a log.

    python examples/benchmarks/score.py [--samples 200000] [--repeats 3] [--largest 10000000]

Prints the tables and saves them to examples/results/score.json. Synthetic logs in a temporary folder,
2.5 GB at most: of D = 2048 against numpy, of D = 64 for the growth, where each length and each of top 10
and outliers runs in a process of its own, so that its peak memory is seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import diffhook
from diffhook.log import LogWriter, Snapshot, Table
from diffhook.log.table_writer import TableWriter

RESULT = Path(__file__).parents[1] / "results" / "score.json"
DIM, QUERIES, SNAPSHOTS, SHARD = 2048, 64, 3, 4096
SAMPLES, NARROW = 10_000, 64  # samples and D in the logs of growing length
GROWTH = (10_000, 100_000, 1_000_000, 10_000_000)


def make_log(path: Path, rows: int, samples: int, dim: int) -> diffhook.RunLog:
    """Rows of samples in turn, at one snapshot after the other."""
    projection = {"dim": dim, "seed": 0, "kind": "sketch"}
    identity = {"projection": projection, "parameters": [], "model": {"class": "none"}, "objective": None}
    writer = LogWriter(path, {"identity": identity})
    for step in range(SNAPSHOTS):
        writer.snapshot(Snapshot(step, 0.1, 0.1, writer.session), b"")
    writer.close()
    store = diffhook.open_log(path).writable_store()
    rng = np.random.default_rng(0)
    steps = np.minimum(np.arange(rows) * SNAPSHOTS // rows, SNAPSHOTS - 1)
    table = TableWriter(store, "train/rank-0000", dim, "float16")
    for start in range(0, rows, SHARD):
        stop = min(start + SHARD, rows)
        table.append(random_rows(rng, np.arange(start, stop) % samples, steps[start:stop], dim))
    table.flush()
    asked = TableWriter(store, "queries/q/rank-0000", dim, "float16")
    for step in range(SNAPSHOTS):
        asked.append(random_rows(rng, np.arange(QUERIES), np.full(QUERIES, step), dim))
    asked.flush()
    asked.describe({"objective": {}, "snapshots": [[step, 0] for step in range(SNAPSHOTS)]})
    return diffhook.open_log(path)


def random_rows(rng: np.random.Generator, sample: Any, step: Any, dim: int) -> dict[str, Any]:
    count = len(sample)
    values = rng.standard_normal((count, dim), np.float32) / np.float32(dim**0.5)
    ones = np.ones(count, np.float32)
    return {
        "sample": np.asarray(sample, np.int64),
        "step": np.asarray(step, np.int64),
        "timestep": rng.integers(1, 1000, count).astype(np.float32),
        "noise_seed": np.zeros(count, np.int64),
        **dict.fromkeys(("lr", "loss", "weight", "grad_norm"), ones),
        "projection": values.astype(np.float16),
    }


def directions(log: diffhook.RunLog) -> np.ndarray:
    """(K, Q, D) float32 of the queries, ReTrac."""
    table = log.queries["q"]
    return table["projection"].astype(np.float32).reshape(SNAPSHOTS, QUERIES, DIM)


def numpy_stream(table: Table, asked: np.ndarray, samples: int) -> np.ndarray:
    """Read the shards, convert, multiply: the least that any scoring from the log must do."""
    scores = np.zeros((samples, QUERIES), np.float32)
    for block in table.blocks():
        step, sample = table.read(block, "step"), table.read(block, "sample")
        projection = table.read(block, "projection").astype(np.float32)
        for k in np.unique(step):
            np.add.at(scores, sample[step == k], projection[step == k] @ asked[k].T)
    return scores.T


def in_memory(samples: int, asked: np.ndarray) -> Callable[[], Any]:
    """As many numbers multiplied, in float32 and in memory already."""
    matrix = np.ones((samples, DIM), np.float32)
    return lambda: sum(matrix @ asked[k].T for k in range(SNAPSHOTS))


def against_numpy(folder: Path, samples: int, repeats: int) -> dict[str, Any]:
    rows = samples * SNAPSHOTS
    log = make_log(folder / "main", rows, samples, DIM)
    asked = directions(log)
    ways: dict[str, Callable[[], Any]] = {
        "numpy in memory, float32": in_memory(samples, asked),
        "numpy over the shards": lambda: numpy_stream(log.train, asked, samples),
        "diffhook, all scores": lambda: diffhook.influence(log, "q").values,
        "diffhook, top 10": lambda: diffhook.influence(log, "q").top(10),
        "diffhook, self-influence": lambda: diffhook.self_influence(log, "tracin"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = found = np.empty(0)
    for _ in range(repeats):  # in turn, so that a busy machine is busy for all
        for name, way in ways.items():
            began = time.perf_counter()
            result = way()
            seconds[name].append(time.perf_counter() - began)
            expected = result if name == "numpy over the shards" else expected
            found = result if name == "diffhook, all scores" else found
    median = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = [
        n / d for n, d in zip(seconds["numpy over the shards"], seconds["diffhook, all scores"], strict=True)
    ]
    return {
        "rows": rows,
        "bytes": rows * DIM * 2,
        "seconds": median,
        "speed_against_numpy_over_shards": statistics.median(ratios),
        "largest_difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "cost": str(diffhook.influence(log, "q").cost),
    }


def grown(folder: Path, rows: int) -> dict[str, Any]:
    """Time and peak memory of each task over a log of so many rows."""
    path = folder / str(rows)
    make_log(path, rows, min(SAMPLES, rows), NARROW)
    found: dict[str, Any] = {"rows": rows}
    for task in TASKS:
        command = [sys.executable, __file__, "--one", str(path), "--task", task]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[task] = json.loads(done.stdout)
    return found


def top_10(log: diffhook.RunLog) -> None:
    diffhook.influence(log, "q").top(10)


def outlying(log: diffhook.RunLog) -> None:
    diffhook.outliers(log, signals=["norm", "repeat", "tracin"])


TASKS: dict[str, Callable[[diffhook.RunLog], None]] = {"top 10": top_10, "outliers": outlying}


def one(path: str, task: str) -> None:
    log = diffhook.open_log(path)
    import_module("diffhook.analysis")  # with the libraries that it brings
    before = _memory("VmRSS")
    began = time.perf_counter()
    TASKS[task](log)
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "peak": _memory("VmHWM"), "before": before}
    if task == "top 10":
        found["said"] = diffhook.influence(log, "q").cost.memory
    print(json.dumps(found))


def _memory(line: str) -> int:
    """Bytes, of this process alone: getrusage would count the parent's memory too."""
    return int(Path("/proc/self/status").read_text().partition(f"{line}:")[2].split()[0]) * 1024


def on_paper(main: dict[str, Any]) -> list[dict[str, Any]]:
    """Larger logs at the bytes per second of the top 10 that was measured."""
    speed = main["bytes"] / main["seconds"]["diffhook, top 10"]
    table = []
    for rows in (10**8, 10**9):
        size = rows * (DIM * 2 + 44)
        hours = {f"hours_{workers}": size / speed / workers / 3600 for workers in (1, 16, 256)}
        table.append({"rows": rows, "bytes": size, **hours})
    return [{"bytes_per_second": speed}, *table]


def show(result: dict[str, Any]) -> None:
    main = result["main"]
    print(f"\n{main['rows']:,} rows × {DIM}, {QUERIES} queries at {SNAPSHOTS} snapshots")
    for name, seconds in main["seconds"].items():
        print(f"  {name:<28} {seconds:7.2f} s   {main['bytes'] / seconds / 1e9:5.2f} GB/s")
    print(f"  speed against numpy over the shards: {main['speed_against_numpy_over_shards']:.2f}")
    print(f"\nrows × {NARROW}: seconds and peak memory, of which before the first row is read")
    for row in result["growth"]:
        cells = (
            f"{task} {row[task]['seconds']:7.2f} s {row[task]['peak'] / 1e6:5.0f} MB "
            f"({row[task]['before'] / 1e6:.0f} MB)"
            for task in TASKS
        )
        print(f"{row['rows']:>10,}   {'   '.join(cells)}")
    for row in result["paper"][1:]:
        hours = ", ".join(f"{row[f'hours_{w}']:.2f} h on {w}" for w in (1, 16, 256))
        print(f"{row['rows']:>13,} rows, {row['bytes'] / 1e12:.2f} TB, on paper: {hours} such machines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--largest", type=int, default=GROWTH[-1], help="rows of the longest log")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.task)
        return
    with tempfile.TemporaryDirectory() as name:
        compared = against_numpy(Path(name), args.samples, args.repeats)
    growth = []
    for rows in (rows for rows in GROWTH if rows <= args.largest):
        with tempfile.TemporaryDirectory() as name:
            growth.append(grown(Path(name), rows))
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from machine import machine  # brings torch, whose memory is not to be counted above

    result = {"date": date.today().isoformat(), "machine": machine(), "main": compared, "growth": growth}
    result |= {"repeats": args.repeats, "paper": on_paper(compared)}
    show(result)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
