"""The rows of a run so far, step by step, as detectors saw them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffhook.log import RunLog, Table
from diffhook.log.schema import SCALARS, Rows

_MOST = 32_768  # rows that a resumed run looks at again: thresholds are learned anew from fewer


def replayed_steps(log: RunLog, rank: int, most: int = _MOST) -> Iterator[Rows]:
    """Scalar columns of each step that one process logged, oldest first; the last ``most`` rows only.

    Raises:
        LogError: the log is damaged.
    """
    group = log.index.groups("train").get(rank)
    table = Table("train", [] if group is None else [group])
    parts: list[Rows] = []
    for block in reversed(list(table.blocks())):  # a log may have far more rows than a process should hold
        parts.insert(0, {name: table.read(block, name) for name in SCALARS})
        if sum(len(part["sample"]) for part in parts) >= most:
            break
    if not parts:
        return
    columns = {name: np.concatenate([part[name] for part in parts])[-most:] for name in SCALARS}
    lr = np.nan_to_num(columns["lr"], nan=-1.0)  # a skipped step has the number of the one after it
    begins = np.flatnonzero((np.diff(columns["step"]) != 0) | (np.diff(lr) != 0)) + 1
    for rows in np.split(np.arange(len(lr)), begins):
        yield {name: values[rows] for name, values in columns.items()}
