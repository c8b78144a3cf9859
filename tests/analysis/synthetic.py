"""Logs of random rows, written without a model, and the gradients that went into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import diffhook
from diffhook.log import LogWriter, Snapshot
from diffhook.log.table_writer import TableWriter

DIM = 24
STEPS = (4, 8)
TIMES = (100.0, 500.0, 900.0)
GRID = {"timesteps": list(TIMES), "draws": 1, "seed": 0, "replicates": 3}
SAMPLES = np.array([2, 3, 5, 7, 11, 13, 17])


@dataclass
class Rows:
    """Rows with their whole gradients, float64."""

    gradient: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.gradient)


def make_rows(
    rng: np.random.Generator,
    cells: Sequence[tuple[int, int, float, int]],
    weight: float,
    shared: float = 0.0,
) -> Rows:
    """Rows for (sample, step, timestep, noise seed) cells; a sample's gradients have something in common.

    Args:
        shared: length of what all gradients have in common, where a sample's own is 1.
    """
    common = shared * np.random.default_rng(1000).standard_normal(DIM)
    gradient = np.empty((len(cells), DIM))
    for row, (sample, _, timestep, _) in enumerate(cells):
        own = np.random.default_rng(int(sample)).standard_normal(DIM)
        gradient[row] = (common + own + rng.standard_normal(DIM)) * (0.1 + timestep / 300)
    sample, step, timestep, seed = (np.array(column) for column in zip(*cells, strict=True))
    columns = {
        "sample": sample.astype(np.int64),
        "step": step.astype(np.int64),
        "timestep": timestep.astype(np.float32),
        "noise_seed": seed.astype(np.int64),
        "replicate": seed.clip(0).astype(np.int16),
        "lr": (0.01 * (1 + step)).astype(np.float32),
        "loss": rng.uniform(0.5, 2, len(cells)).astype(np.float32),
        "weight": np.full(len(cells), weight, np.float32),
    }
    return Rows(gradient, columns)


def stored(rows: Rows) -> dict[str, np.ndarray]:
    norm = np.linalg.norm(rows.gradient, axis=1)
    unit = (rows.gradient / norm[:, None]).astype(np.float32)
    return {**rows.columns, "grad_norm": norm.astype(np.float32), "projection": unit}


@dataclass
class Synthetic:
    log: diffhook.RunLog
    train: Rows
    probe: Rows
    queries: dict[str, Rows]


def sketched(dim: int) -> dict[str, Any]:
    """The configuration of a log whose rows tests make up, with projections to ``dim`` numbers."""
    return {
        "identity": {
            "projection": {"dim": dim, "seed": 0, "kind": "sketch"},
            "parameters": [],
            "model": {"class": "none"},
            "objective": None,
        }
    }


def config(measurement: str = "loss") -> dict[str, Any]:
    return {
        "identity": {
            "projection": {"dim": DIM, "seed": 0, "kind": "full"},
            "parameters": [["w", [DIM]]],
            "model": {"class": "tests.Random"},
            "objective": {"kind": "diffusion", "measurement": measurement},
        },
        "probe": {"grid": GRID},
    }


def write_queries(
    path: Path, name: str, rows: Rows, measurement: str = "loss", *, preconditioned: bool = False
) -> None:
    writer = TableWriter(
        diffhook.open_log(path).writable_store(), f"queries/{name}/rank-0000", DIM, "float32"
    )
    for own_noise in (0, 1):  # the same again, to be set against the training's own rows
        writer.append({**stored(rows), "own_noise": np.full(len(rows), own_noise, np.int8)})
    writer.flush()
    described = {
        "objective": {"measurement": measurement},
        "grid": {**GRID, "replicates": len(np.unique(rows.columns["replicate"]))},
        "against": ["train", "probe"],
        "snapshots": [[step, 0] for step in STEPS],
        "preconditioned": preconditioned,
    }
    writer.describe(described)


def synthetic(
    path: Path, replicates: int = 3, visits: int = 10, probed: Any = SAMPLES, shared: float = 0.0
) -> Synthetic:
    """Train and probe rows, and queries "new", "squared", "train-squared", "mean", "train-mean"; and "twins",
    which resemble samples 2 and 3."""
    rng = np.random.default_rng(0)
    events = [
        (int(sample), step, float(rng.integers(1, 1000)), -1)
        for step in range(visits)
        for sample in rng.permutation(SAMPLES)
    ]
    drawn = range(replicates)
    grid = [(int(s), step, t, r) for step in STEPS for t in TIMES for r in drawn for s in SAMPLES]
    twins = [(q, step, t, 0) for step in STEPS for t in TIMES for q in (2, 3)]
    asked = [(q, step, t, r) for step in STEPS for t in TIMES for r in range(replicates) for q in range(4)]
    train = make_rows(rng, events, 0.25, shared)
    probed_cells = [cell for cell in grid if cell[0] in probed]
    probe = make_rows(rng, probed_cells, 0.5 / (len(TIMES) * replicates), shared)
    described = config()
    described["probe"] = {"grid": {**GRID, "replicates": replicates}}
    writer = LogWriter(path, described)
    writer.put("train", stored(train))
    writer.put("probe", stored(probe))
    for step in STEPS:
        writer.snapshot(Snapshot(step, 0.1, 0.4, writer.session), b"")
    writer.close()
    queries = {"new": make_rows(rng, asked, 1 / (len(TIMES) * replicates))}
    write_queries(path, "new", queries["new"])
    queries["twins"] = make_rows(rng, twins, 1 / len(TIMES), shared)
    write_queries(path, "twins", queries["twins"])
    for name, measurement in (("squared", "squared-output"), ("mean", "mean-output")):
        queries[name] = make_rows(rng, asked, 1 / (len(TIMES) * replicates))
        queries[f"train-{name}"] = make_rows(rng, grid, 1 / (len(TIMES) * replicates))
        write_queries(path, name, queries[name], measurement)
        write_queries(path, f"train-{name}", queries[f"train-{name}"], measurement)
    return Synthetic(diffhook.open_log(path), train, probe, queries)
