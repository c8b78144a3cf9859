"""Which rows of probes a log holds, and which are still to be made: by any process, killed or not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from zarr.abc.store import Store

from diffhook.log.index import LogIndex


class HeldRows:
    """Counts rows by snapshot and sample, of all processes; each row is read once.

    Args:
        store: the log's.
        rows: of one sample at one snapshot.
    """

    def __init__(self, store: Store, rows: int) -> None:
        self._store, self._rows = store, rows
        self._seen: dict[int, int] = {}  # rank → rows that were counted
        self._counts: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def update(self) -> None:
        """Count what was committed since."""
        for rank, group in LogIndex(self._store).groups("probe").items():
            start, stop = self._seen.get(rank, 0), group.committed
            if stop <= start:
                continue
            valid = group.valid_in(start, stop)
            steps, samples = (group.read(name, start, stop, valid)[valid] for name in ("step", "sample"))
            pairs, counts = np.unique(np.stack([steps, samples]), axis=1, return_counts=True)
            for step, sample, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
                self._counts[step][sample] += count
            self._seen[rank] = stop

    def missing(self, step: int, samples: Iterable[int]) -> list[int]:
        """Those of the samples that lack rows at a snapshot."""
        counts = self._counts[step]
        return [sample for sample in samples if counts[sample] < self._rows]

    def count(self, steps: Iterable[int], samples: Iterable[int]) -> int:
        """Rows of these samples at these snapshots."""
        wanted = set(samples)
        return sum(
            count for step in steps for sample, count in self._counts[step].items() if sample in wanted
        )

    def cells(self, step: int, samples: Sequence[int]) -> set[tuple[int, int]]:
        """(sample, noise seed) of the rows that are there of samples that lack some: after a kill, few."""
        partly = [sample for sample in samples if 0 < self._counts[step][sample] < self._rows]
        found: set[tuple[int, int]] = set()
        if not partly:
            return found
        for rank, group in LogIndex(self._store).groups("probe").items():
            stop = self._seen.get(rank, 0)
            valid = group.valid_in(0, stop)
            columns = (group.read(name, 0, stop, valid) for name in ("step", "sample", "noise_seed"))
            steps, ids, seeds = columns
            rows = valid & (steps == step) & np.isin(ids, partly)
            found |= set(zip(ids[rows].tolist(), seeds[rows].tolist(), strict=True))
        return found
