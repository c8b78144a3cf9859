"""Logs of runs that never were, and photographs to go with them: a page needs no training to be tested."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_sample_images

from diffhook.appearance import COLUMNS
from diffhook.capture.samples.appearance import appearance
from diffhook.log import LogWriter, RunLog, Snapshot, open_log
from diffhook.log import store as files
from diffhook.log.samples import name_id
from diffhook.log.table_writer import TableWriter

DIM = 16
BATCH = 8
QUERIES = 6
CONFIG: dict[str, Any] = {
    "identity": {
        "projection": {"dim": DIM, "seed": 0, "kind": "sketch"},
        "parameters": [["inward.weight", [6, 1, 3, 3]], ["inward.bias", [6]]],
        "model": {"class": "diffusers.UNet2DModel", "config": {"in_channels": 1, "sample_size": 8}},
        "objective": None,
    },
    "versions": {"python": "3.11", "diffhook": "<b>0</b>"},
}

SUMMARY = {
    "seconds": 100.0,
    "capture_seconds": 8.0,
    "probe_seconds": 0.0,
    "capture_overhead": 0.087,
    "stride": 2,
}


def write_log(
    path: Path,
    samples: int = 200,
    epochs: int = 3,
    *,
    alerts: bool = True,
    names: Sequence[str] | None = None,
    images: npt.NDArray[np.uint8] | None = None,
) -> RunLog:
    """Gradients that fall with the timestep; every 20th sample pulls 30 times as hard; one is NaN.

    With names, sample i has the name i and an id that is made of it. With images, (samples, H, W, C), rows
    have the figures of theirs, as a loop that trains on [−1, 1] sees them.
    """
    rng = np.random.default_rng(0)
    writer = LogWriter(path, CONFIG if images is None else _for_images(images.shape[-1]))
    steps = samples * epochs // BATCH
    sample = np.concatenate([rng.permutation(samples) for _ in range(epochs)])[: steps * BATCH]
    rows = _rows(rng, sample, np.repeat(np.arange(steps), BATCH), _directions(samples))
    rows["grad_norm"][sample % 20 == 3] *= 30
    rows["grad_norm"][sample == 7] = np.nan
    if images is not None:
        clean = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        rows |= dict(zip(COLUMNS, appearance(clean)[sample].numpy().T, strict=True))
    if names is not None:
        rows["sample"] = np.array([name_id(name) for name in names])[sample]
        writer.keep_names({name_id(name): name for name in names})
    writer.put("train", rows)
    for step in (steps // 2, steps):
        writer.snapshot(Snapshot(step, 1e-3, 1e-3 * steps / 2), b"")
    for step in range(0, steps, max(steps // 15, 1)) if alerts else ():
        writer.alert(_alert(step, rows["sample"][step * BATCH :][:4].tolist()))
    writer.record("plan.json", {"text": ["diffhook: capturing every step", "  8 rows <each>"]})
    writer.record("summary.json", SUMMARY)
    writer.close()
    write_queries(path, "held-out")
    return open_log(path)


def _for_images(channels: int) -> dict[str, Any]:
    model = {"class": "diffusers.UNet2DModel", "config": {"in_channels": channels}}
    return {**CONFIG, "identity": {**CONFIG["identity"], "model": model}}


def photographs(count: int, size: int = 96) -> npt.NDArray[np.uint8]:
    """(count, size, size, 3) pieces of scikit-learn's two photographs."""
    rng = np.random.default_rng(1)
    photos = load_sample_images().images
    pieces = []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        top, left = (rng.integers(side - size) for side in photo.shape[:2])
        pieces.append(photo[top : top + size, left : left + size])
    return np.stack(pieces)


def _rows(rng: np.random.Generator, sample: Any, step: Any, directions: Any) -> dict[str, Any]:
    count = len(sample)
    timestep = rng.integers(0, 1000, count).astype(np.float32)
    projection = directions[sample] + 2 * rng.standard_normal((count, DIM))
    projection /= np.linalg.norm(projection, axis=1, keepdims=True)
    return {
        "sample": np.asarray(sample),
        "step": np.asarray(step),
        "timestep": timestep,
        "noise_seed": np.full(count, -1),
        "lr": np.full(count, 1e-3, np.float32),
        "loss": rng.random(count, np.float32),
        "weight": np.full(count, 1 / BATCH, np.float32),
        "grad_norm": np.exp(rng.normal(0, 0.3, count) - timestep / 400).astype(np.float32),
        "projection": projection.astype(np.float16),
    }


def write_queries(path: Path, name: str, measurement: str = "loss") -> None:
    """Queries that resemble the first samples, at the log's snapshots."""
    rng = np.random.default_rng(2)
    steps = [snapshot.step for snapshot in open_log(path).snapshots]
    store = files.open_store(path, read_only=False)
    writer = TableWriter(store, f"queries/{name}/rank-0000", DIM, "float16")
    for step in steps:
        query = np.repeat(np.arange(QUERIES), 10)
        rows = _rows(rng, query, np.full(len(query), step), _directions(QUERIES))
        writer.append({**rows, "own_noise": np.ones(len(query), np.int8)})
    writer.flush()
    writer.describe({
        "objective": {"measurement": measurement},
        "snapshots": [[step, 0] for step in steps],
        "against": ["train"],
    })  # fmt: skip


def _directions(samples: int) -> Any:
    return np.random.default_rng(3).standard_normal((samples, DIM))


def _alert(step: int, samples: list[int]) -> dict[str, Any]:
    error = step % 2
    return {
        "kind": "non-finite" if error else "norm-outlier",
        "level": "error" if error else "warning",
        "samples": samples if error else samples[:1],
        "step": step,
        "timestep": 36.0,
        "value": 5.1,
        "threshold": 4.0,
        "message": f"sample {samples[0]} has 6.6 times the typical gradient norm near timestep 36 <now>",
    }
