"""Write the golden log of the schema that this diffhook writes: python tests/log/golden/make.py

Run when SCHEMA_VERSION is raised: tests/log/test_format.py then holds writer and reader to what is in it,
so that the format does not change unseen.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import numpy as np

from diffhook.log import SCHEMA_VERSION, LogWriter, Rows, Snapshot
from diffhook.log import table_writer as writing

FOLDER = Path(__file__).parent
DIM = 4
CONFIG = {
    "identity": {
        "projection": {"dim": DIM, "seed": 0, "kind": "sketch"},
        "parameters": [["weight", [2, 3]]],
        "model": {"class": "golden.Tiny"},
        "objective": None,
    },
    "versions": {"diffhook": "golden"},
}


def rows(count: int, first: int, step: int) -> Rows:
    """Numbers that can be said without a generator."""
    index = np.arange(first, first + count)
    return {
        "sample": index,
        "step": np.full(count, step),
        "timestep": (index * 10).astype(np.float32),
        "noise_seed": np.full(count, -1),
        "lr": np.full(count, 0.5, np.float32),
        "loss": np.where(index % 5 == 0, np.nan, index / 4).astype(np.float32),
        "weight": np.full(count, 0.25, np.float32),
        "grad_norm": (1 + index / 8).astype(np.float32),
        "projection": (np.outer(index, [1, -1, 2, 0]) / 64).astype(np.float16),
    }


def write(location: Path) -> None:
    """Two ranks, resumed at step 3 of 5; probes; snapshots; alerts."""
    writing.rows_per_shard = lambda dim, dtype: 8  # type: ignore[assignment]
    for start in (0, 3):
        for rank in (0, 1):
            log = LogWriter(location, CONFIG, rank=rank, start_step=start)
            for step in range(start, 5):
                log.put("train", rows(4, 100 * rank + 4 * step, step))
            if rank == 0:
                log.snapshot(Snapshot(5, 0.5, 2.5), b"parameters after 5 steps")
                log.put("probe", rows(3, 0, 5))
                log.alert({"step": 4, "kind": "golden", "message": "an alert"})
            log.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        write(log)
        with zipfile.ZipFile(FOLDER / f"schema-{SCHEMA_VERSION}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(p for p in log.rglob("*") if p.is_file()):
                archive.write(path, path.relative_to(log))


if __name__ == "__main__":
    main()
