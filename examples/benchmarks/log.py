"""What the log costs: its write throughput, and what flushing does to a training step.

    python examples/benchmarks/log.py [--repeats 5] [--steps 128]

Throughput is compared with plain writes of the same bytes to one file, each brought to the disk
(fsync). The step is the forward and backward of a small UNet; its rows fill a shard every few steps.
Prints both and saves them to examples/results/log.json.
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
from diffhook.log.schema import rows_per_shard

RESULT = Path(__file__).parents[1] / "results" / "log.json"
DIM = 2048
SHARD = rows_per_shard(DIM, "float16")
SHARDS = 8
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


def throughput(folder: Path, projection: np.ndarray) -> dict[str, float]:
    """Seconds for eight shards: through the log, and as plain files."""
    rows = make_rows(SHARD, 0, projection)
    writer = LogWriter(folder / "log", CONFIG)
    began = time.perf_counter()
    for _ in range(SHARDS):
        writer.put("train", rows)
    writer.close(timeout=600)
    ours = time.perf_counter() - began
    content = [np.ascontiguousarray(column).tobytes() for column in rows.values()]
    began = time.perf_counter()
    for index in range(SHARDS):
        with open(folder / f"plain-{index}", "wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    plain = time.perf_counter() - began
    size = SHARDS * sum(map(len, content))
    return {"log_MB_per_s": size / ours / 1e6, "plain_MB_per_s": size / plain / 1e6, "ratio": plain / ours}


def stall(folder: Path, projection: np.ndarray, steps: int) -> dict[str, float]:
    """Seconds of a training step alone, and with rows handed to the log; the two take turns.

    Each step hands over 256 rows, eight times its batch, so that a shard goes to the disk every 16 steps.
    """
    case = small_unet()
    rows = make_rows(256, 0, projection)
    writer = LogWriter(folder / "log", CONFIG)
    alone, logged, handing = [], [], []
    for index in range(steps):
        began = time.perf_counter()
        case.model.zero_grad(set_to_none=True)
        case.losses().mean().backward()
        seconds = time.perf_counter() - began
        if index // (SHARD // 256) % 2:
            alone.append(seconds)
            continue
        began = time.perf_counter()
        writer.put("train", rows)
        handing.append(time.perf_counter() - began)
        logged.append(seconds + handing[-1])
    writer.close(timeout=600)
    return {
        "step_ms": statistics.median(alone) * 1e3,
        "put_ms_mean": statistics.mean(handing) * 1e3,
        "put_ms_max": max(handing) * 1e3,
        "share_handing_over": statistics.mean(handing) / statistics.median(alone),
        "share_worst_step": max(handing) / statistics.median(alone),
        "mean_step_logged_over_alone": statistics.mean(logged) / statistics.mean(alone),
        "shards_flushed": len(handing) * 256 // SHARD,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.manual_seed(0)
    projection = np.random.default_rng(0).standard_normal((SHARD, DIM)).astype(np.float16)
    written = []
    for _ in range(args.repeats):
        folder = Path(tempfile.mkdtemp(prefix="diffhook-log-"))
        written.append(throughput(folder, projection))
        shutil.rmtree(folder)
        print({name: round(value, 2) for name, value in written[-1].items()}, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="diffhook-log-"))
    stalled = stall(folder, projection, args.steps)
    shutil.rmtree(folder)
    document: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "repeats": args.repeats,
        "shard_bytes": SHARD * DIM * 2,
        "write": {name: round(statistics.median(w[name] for w in written), 3) for name in written[0]},
        "stall": {name: round(value, 4) for name, value in stalled.items()},
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
