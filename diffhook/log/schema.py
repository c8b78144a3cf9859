"""What a log holds. One row is one per-sample gradient. FORMAT.md, beside this file, has the details.

LOG/
  zarr.json                   attributes: {"diffhook": {"schema": 3, "config": {…}, "crc32": …}}
  train/rank-0000/<column>    the training's own steps, one group per process
  probe/rank-0000/<column>    chosen samples on a grid of timesteps, at every snapshot
  queries/<name>/rank-0000/…  the images one asks about, likewise
  snapshots/step-00000500/    parameters.safetensors, then snapshot.json as commit mark;
                              preconditioner.safetensors, only where it was asked for
  alerts/rank-0000.jsonl      one JSON object a line
  names/rank-0000-000.json    sample id → name, where samples have names: see samples.py
  thumbnails/rank-0000-000.zip  images, only where they were asked for
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SCHEMA_VERSION = 3
"""What is written and read. A change of the format raises it, and FORMAT.md, "Versions", says what else."""

Rows = Mapping[str, npt.NDArray[Any]]  # column name → (rows,) array, or (rows, D) for projection


@dataclass(frozen=True)
class Column:
    name: str
    dtype: str
    fill: float
    meaning: str
    optional: bool = False  # a writer may leave it out, and older logs lack it: it reads as its fill


COLUMNS = (
    Column("step", "int64", -1, "optimiser steps taken before this one"),
    Column("timestep", "float32", np.nan, "diffusion timestep, in the scheduler's units"),
    Column("noise_seed", "int64", -1, "seed of the (first) noise draw; -1: drawn by the training loop"),
    Column("replicate", "int16", 0, "which of a grid's noise replicates", True),
    Column("own_noise", "int8", 0, "1: noise of the query's own; 0: of the grid or the training loop", True),
    Column("lr", "float32", np.nan, "learning rate of the step; probes: summed since the snapshot before"),
    Column("loss", "float32", np.nan, "the sample's own loss; NaN: not known"),
    Column("weight", "float32", np.nan, "factor on lr that makes scores sums over rows"),
    Column("grad_norm", "float32", np.nan, "exact L2 norm of the gradient of the sample's own loss"),
    Column("role", "int8", 0, "what the sample is for: 0 training, 1 regularisation (class images)", True),
    Column("input_mean", "float32", np.nan, "mean of the clean sample, in the model's units", True),
    Column("input_contrast", "float32", np.nan, "standard deviation of the clean sample", True),
    Column("input_roughness", "float32", np.nan, "root mean square of its neighbours' differences", True),
    Column("label_contrast", "float32", np.nan, "log loss, own label − best other label", True),
    Column("label", "int64", -1, "the class that the model was told of the sample", True),
    Column("better_label", "int64", -1, "the other class under which its loss is smallest", True),
    Column("projection", "float16", 0, "projection of the gradient divided by grad_norm"),
    Column("sample", "int64", -1, "sample id"),
)  # fmt: skip
"""In the order in which they are written."""

BY_NAME = {column.name: column for column in COLUMNS}
REQUIRED = tuple(c.name for c in COLUMNS if not c.optional and c.name != "projection")
SCALARS = tuple(column.name for column in COLUMNS if column.name != "projection")


def projection_dtype(kind: str) -> str:
    """float16 halves a sketch at no loss that counts; full gradients are kept to be exact."""
    return "float32" if kind == "full" else "float16"


def rows_per_shard(dim: int, dtype: str) -> int:
    """Rows that make about 16 MiB of projections: large enough to stream, small enough to buffer."""
    if dim == 0:
        return 16384
    rows = (1 << 24) // (dim * np.dtype(dtype).itemsize)
    return min(max(rows // 512 * 512, 512), 16384) if rows >= 512 else max(rows, 1)


def differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Where two configurations differ, as "path: found …, expected …" lines."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in [*found, *(k for k in expected if k not in found)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(found.get(key), expected.get(key), inner)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            yield from differences(a, b, f"{path}[{index}]")
    elif found != expected:
        yield f"{path}: the log has {_short(found)}, this run {_short(expected)}"


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def json_like(value: Any) -> Any:
    """The value as JSON gives it back: tuples and arrays are lists, keys are strings, the rest is type
    names."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    as_list = getattr(value, "tolist", None)  # arrays, tensors and their numbers
    return type(value).__qualname__ if as_list is None else as_list()
