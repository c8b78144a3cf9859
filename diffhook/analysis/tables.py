"""From a log and the user's words to tables, with the errors that belong there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diffhook.errors import ConfigurationError, LogError
from diffhook.log import RunLog, Table


def source_table(log: RunLog, source: str, *, projected: bool = True) -> Table:
    """The table that ``source`` names.

    Raises:
        ConfigurationError: neither "train" nor "probe".
        LogError: it has no rows, or no projections where they are needed.
    """
    if source not in ("train", "probe"):
        raise ConfigurationError(f"source is {source!r}; expected 'train' or 'probe'")
    table = log.train if source == "train" else log.probe
    if not len(table):
        hint = " (probes need DiffHook(objective=...))" if source == "probe" else ""
        raise LogError(f"{log.location} has no {source} rows{hint}")
    if projected and not table.dim:
        raise LogError(
            f"{log.location} was captured with projection_dim=0: it has norms only, and this "
            "score needs projections"
        )
    return table


def query_table(log: RunLog, name: str) -> Table:
    """The rows of a query set.

    Raises:
        LogError: there is no such set; names those there are.
    """
    queries = log.queries
    if name not in queries:
        known = ", ".join(queries) or "none yet: see `diffhook query --help`"
        raise LogError(f"{log.location} has no queries {name!r}; it has {known}")
    return queries[name]


def nearest(steps: npt.NDArray[np.int64], snapshots: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """For each step the position of the nearest snapshot step, the earlier one on a tie.

    Args:
        steps: (rows,).
        snapshots: (K,), ascending.
    """
    after = np.searchsorted(snapshots, steps).clip(0, len(snapshots) - 1)
    before = (after - 1).clip(0)
    closer = np.abs(steps - snapshots[before]) <= np.abs(snapshots[after] - steps)
    return np.where(closer, before, after)
