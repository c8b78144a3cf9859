"""What is asked for when nothing is said: the best that a log and a query set can serve."""

from __future__ import annotations

import logging
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.methods import DEFAULT
from diffhook.analysis.pairing import PROBE, TRAIN, serves
from diffhook.analysis.tables import FLUSH
from diffhook.log import RunLog, open_log
from diffhook.log.lock import rows_in_memory
from diffhook.log.samples import ROLE_STRIDE
from diffhook.log.store import Location

logger = logging.getLogger("diffhook")

_FEW = 0.1  # of the samples, of which it is worth while to ask why they were not probed

_told: WeakSet[RunLog] = WeakSet()
"""Logs whose rows in memory have been told of: a page reads the same log a dozen times."""


def as_log(log: RunLog | Location) -> RunLog:
    """A log, or the one at a path, URL or store. Rows of a run in this process that wait in memory are told,
    once for a log that is given as such.

    Raises:
        ConfigurationError, LogError: as :func:`diffhook.open_log`.
    """
    found = log if isinstance(log, RunLog) else open_log(log)
    waiting = rows_in_memory(found.store)
    if waiting and found not in _told:
        _told.add(found)
        logger.warning(
            "%s rows of %s are still in memory and do not count: %s", f"{waiting:,}", found.location, FLUSH
        )
    return found


def default_method(log: RunLog) -> str:
    """Whitened ReTrac; for a log of sums (``compact --aggregate``), the method that they were made for."""
    return str(log.config["identity"].get("aggregate", DEFAULT))


def best_source(log: RunLog, queries: str | None = None, execution: Execution | None = None) -> str:
    """Which rows tell most: "probe" where probes hold every sample that was trained on, else "train".

    A sample whose gradients were never finite (a broken image) has no part in it.

    Args:
        queries: a set that may be made for one of them only, which then decides.
    """
    if not len(log.probe) or not len(log.train):
        return PROBE if len(log.probe) else TRAIN
    able = [kind for kind in (PROBE, TRAIN) if queries is None or serves(log, queries, kind)]
    if len(able) == 1:
        return able[0]
    execution = execution or Execution()
    trained, probed = (distinct_samples(table, execution) for table in (log.train, log.probe))
    trained = trained[trained < ROLE_STRIDE]
    missing = trained[~np.isin(trained, probed)]
    few = len(missing) <= _FEW * len(trained)
    return PROBE if not len(missing) or (few and not _ever_finite(log, missing)) else TRAIN


def _ever_finite(log: RunLog, samples: npt.NDArray[np.int64]) -> bool:
    """Whether any of the samples has a training row with a finite gradient."""
    finite = np.isfinite(log.train["grad_norm"])
    return bool(np.isin(samples, log.train["sample"][finite]).any())
