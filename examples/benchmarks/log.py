"""What the log costs: its write throughput, and what flushing does to a training step.

    python examples/benchmarks/log.py [--repeats 5] [--pairs 6]

Throughput is compared with plain writes of the same bytes, a file for each shard: once with content and
names brought to the disk (fsync) on both sides, once on neither. Then the forward and
backward of a small UNet, alone and with rows handed to the log. Prints both and saves them to
examples/results/log.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import small_unet

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine

from diffhook.log import LogWriter, Rows
from diffhook.log import durable as durable_store
from diffhook.log.schema import rows_per_shard

RESULT = Path(__file__).parents[1] / "results" / "log.json"
DIM = 2048
SHARD = rows_per_shard(DIM, "float16")
SHARDS = 16
ROWS = 256  # handed over at once
CONFIG = {"identity": {"projection": {"dim": DIM, "seed": 0, "kind": "sketch"}}}


def make_rows(count: int, step: int, projection: np.ndarray) -> Rows:
    scalars = {
        name: np.zeros(count, np.float32) for name in ("timestep", "lr", "loss", "weight", "grad_norm")
    }
    return {
        **scalars,
        "sample": np.arange(count),
        "step": np.full(count, step),
        "noise_seed": np.full(count, -1),
        "projection": projection[:count],
    }


def throughput(folder: Path, projection: np.ndarray, durable: bool) -> dict[str, float]:
    """Rates for sixteen shards, 256 rows at a time: through the log, and as plain files, one a shard.

    Args:
        durable: content and names are on the disk at the end, on both sides; or on neither.
    """
    rows = make_rows(ROWS, 0, projection)
    content = [np.ascontiguousarray(column) for column in make_rows(SHARD, 0, projection).values()]
    os.sync()
    sync = durable_store._sync_one
    if not durable:
        durable_store._sync_one = lambda path: None
    writer = LogWriter(folder / "log", CONFIG, memory=1 << 30)
    began = time.perf_counter()
    for _ in range(SHARDS * SHARD // ROWS):
        writer.put("train", rows)
    writer.close(timeout=60)
    ours = time.perf_counter() - began
    durable_store._sync_one = sync
    os.sync()
    began = time.perf_counter()
    for index in range(SHARDS):
        with open(folder / f"plain-{index}", "wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if durable:
            sync(folder)
    plain = time.perf_counter() - began
    size = SHARDS * sum(part.nbytes for part in content)
    return {"log_MB_per_s": size / ours / 1e6, "plain_MB_per_s": size / plain / 1e6, "ratio": plain / ours}


def stall(folder: Path, projection: np.ndarray, pairs: int) -> dict[str, float]:
    """Training steps alone and with rows handed to the log, in turns of the same number of steps.

    Each step hands over 256 rows, eight times its batch, so that a shard goes to the disk every 16 steps.
    """
    case = small_unet()
    rows = make_rows(ROWS, 0, projection)
    every = SHARD // ROWS
    writer = LogWriter(folder / "log", CONFIG)
    for _ in range(every - 1):  # so that the first shard goes to the disk at the first step
        writer.put("train", rows)
    handing: list[float] = []

    def steps(logged: bool) -> float:
        began = time.perf_counter()
        for _ in range(2 * every):
            case.model.zero_grad(set_to_none=True)
            case.losses().mean().backward()
            if logged:
                handed = time.perf_counter()
                writer.put("train", rows)
                handing.append(time.perf_counter() - handed)
        return (time.perf_counter() - began) / (2 * every)

    steps(logged=False)  # warm
    alone, shares = [], []
    for index in range(pairs):
        order = (True, False) if index % 2 else (False, True)
        found = {logged: steps(logged) for logged in order}
        alone.append(found[False])
        shares.append(found[True] / found[False] - 1)
    writer.close(timeout=60)
    step = statistics.median(alone)
    return {
        "rows_a_step": ROWS,
        "step_ms": step * 1e3,
        "put_ms_mean": statistics.mean(handing) * 1e3,
        "put_ms_max": max(handing) * 1e3,
        "share_put_mean": statistics.mean(handing) / step,
        "share_put_max": max(handing) / step,
        "share_longer": statistics.median(shares),
        "share_longer_spread": statistics.stdev(shares),
        "shards": len(handing) // every,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.manual_seed(0)
    projection = np.random.default_rng(0).standard_normal((SHARD, DIM)).astype(np.float16)
    written: dict[str, list[dict[str, float]]] = {"durable": [], "not_durable": []}
    for _ in range(args.repeats):
        for kind, found in written.items():
            folder = Path(tempfile.mkdtemp(prefix="diffhook-log-"))
            found.append(throughput(folder, projection, kind == "durable"))
            shutil.rmtree(folder)
            print(kind, {name: round(value, 2) for name, value in found[-1].items()}, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="diffhook-log-"))
    stalled = stall(folder, projection, args.pairs)
    shutil.rmtree(folder)
    document: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "repeats": args.repeats,
        "shard_bytes": SHARD * DIM * 2,
        "write": {
            kind: {name: round(statistics.median(f[name] for f in found), 3) for name in found[0]}
            for kind, found in written.items()
        },
        "stall": {name: round(value, 4) for name, value in stalled.items()},
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
