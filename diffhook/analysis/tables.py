"""From a log and the user's words to tables, with the errors that belong there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.methods import Method
from diffhook.appearance import COLUMNS
from diffhook.errors import ConfigurationError, LogError
from diffhook.log import RunLog, Table
from diffhook.log.lock import rows_in_memory
from diffhook.words import brief, guess

ROOT = "root"
FLUSH = "call hook.flush(), or accelerator.end_training() where the training is over"
"""What makes a live run's rows count."""


def source_table(log: RunLog, source: str, *, projected: bool = True, method: Method | None = None) -> Table:
    """The table that ``source`` names: "train", "probe", or a query set of training samples.

    Args:
        projected: whether projections are needed.
        method: what its rows are for; None for what looks at each of them.

    Raises:
        ConfigurationError: none of these; or the log holds sums of rows that are for something else.
        LogError: it has no rows, or no projections where they are needed.
    """
    if source not in ("train", "probe"):
        queries = log.queries
        if source not in queries:
            known = f", or a query set of training samples ({', '.join(queries)})" if queries else ""
            hint = guess(source, ["train", "probe", *queries])
            raise ConfigurationError(f"source is {source!r}; expected 'train' or 'probe'{known}.{hint}")
        return queries[source]
    kept = log.config["identity"].get("aggregate")
    if kept is not None and (method is None or method.name != kept):
        asked = "this" if method is None else f"method {method.name!r}"
        raise ConfigurationError(
            f"{log.location} holds sums of rows for {kept} (`diffhook compact --aggregate {kept}`), and "
            f"{asked} needs the rows themselves: ask the log that it was made from"
        )
    table = log.train if source == "train" else log.probe
    if not len(table):
        waiting = rows_in_memory(log.store)
        hint = f" yet; {waiting:,} are in memory: {FLUSH}" if waiting else ""
        if source == "probe" and not waiting:
            hint = ": `diffhook checkpoints` measures samples of a training that is over"
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
    check_query_name(name)
    queries = log.queries
    if name not in queries:
        known = ", ".join(queries) or "none yet: see `diffhook query --help`"
        raise LogError(f"{log.location} has no queries {name!r}; it has {known}.{guess(name, queries)}")
    return queries[name]


def check_query_name(name: str) -> None:
    """Raises ConfigurationError unless it is text: the log comes first, the query set's name second."""
    if not isinstance(name, str):
        raise ConfigurationError(
            f"the query set's name is {brief(name)}; expected text, after the log: "
            'influence(log, "generated"), query(log, samples, "generated")'
        )


def loss_queries(log: RunLog) -> list[str]:
    """Names of the query sets that hold gradients of the training loss, as they are."""
    return [
        name for name in log.queries if _measurement(log, name) == "loss" and not _preconditioned(log, name)
    ]


def check_gradients(log: RunLog, method: Method, source: str, queries: str) -> None:
    """Both sides must hold gradients of the scalar that the method asks for. The queries must be divided by
    Adam's √v̂ + ε where it asks for that, the training rows not; or both by the root of it.

    Raises:
        ConfigurationError: they do not; says how to make them.
    """
    _check_preconditioner(log, method, source, queries)
    _check_measurement(log, method, source, queries)


def _check_preconditioner(log: RunLog, method: Method, source: str, queries: str) -> None:
    left, right = _preconditioned(log, source), _preconditioned(log, queries)
    if left == right == ROOT:
        return  # the products are Adam's, whatever a method makes of them
    if ROOT in (left, right):
        name, lacking = (queries, source) if left != ROOT else (source, queries)
        raise ConfigurationError(
            f"{name!r} holds gradients divided by the root of Adam's √v̂ + ε and {lacking!r} does not: make "
            'both with diffhook.query(log, samples, name, preconditioned="root")'
        )
    if left:
        raise ConfigurationError(
            f"source {source!r} holds preconditioned gradients, which serve as queries only: name training "
            "rows without"
        )
    if right != method.preconditioned:
        wanted, found = ("preconditioned", "plain") if method.preconditioned else ("plain", "preconditioned")
        option = f"preconditioned={method.preconditioned}"
        raise ConfigurationError(
            f"method {method.name!r} needs {wanted} gradients; queries {queries!r} holds {found} ones: "
            f"make a set with diffhook.query(log, samples, name, {option}), and name it"
        )


def _check_measurement(log: RunLog, method: Method, source: str, queries: str) -> None:
    found = {
        f"source {source!r}": _measurement(log, source),
        f"queries {queries!r}": _measurement(log, queries),
    }
    for side, measurement in found.items():
        if measurement != method.measurement:
            how = (
                "diffhook.query(log, samples, name, objective)"
                if method.measurement == "loss"
                else f"diffhook.query(log, samples, name, Measured(objective, {method.measurement!r}))"
            )
            raise ConfigurationError(
                f"method {method.name!r} needs gradients of the {method.measurement}; {side} holds those of "
                f"the {measurement}: make a set with {how}, for the training samples too, and name it"
            )


def _preconditioned(log: RunLog, name: str) -> bool | str:
    """Whether a table's gradients were divided by Adam's √v̂ + ε, or its root: of query sets made so."""
    if name in ("train", "probe"):
        return False
    found: bool | str = (log.queries[name].description or {}).get("preconditioned", False)
    return found


def _measurement(log: RunLog, name: str) -> str:
    if name == "train":
        return "loss"
    if name == "probe":
        described = log.config["identity"].get("objective")
    else:
        described = (log.queries[name].description or {}).get("objective")
    return str((described or {}).get("measurement", "loss"))


def loss_table(log: RunLog) -> Table:
    """A table whose loss column holds the training's loss: probes where there are any, or training rows."""
    probed = len(log.probe) and _measurement(log, "probe") == "loss"
    return log.probe if probed else source_table(log, "train", projected=False)


def appearance_table(log: RunLog) -> Table | None:
    """The table that knows what samples look like: training rows, or probes of a log that has no others; None
    where neither does."""
    tables = (log.train, log.probe)
    return next(
        (t for t in tables if len(t) and any(group.columns >= set(COLUMNS) for group in t.groups)), None
    )


def snapshot_steps(log: RunLog) -> npt.NDArray[np.int64]:
    """(K,) steps of the snapshots, ascending; 0 alone where there are none."""
    return np.unique([s.step for s in log.snapshots] or [0]).astype(np.int64)


def nearest(steps: npt.NDArray[Any], snapshots: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """For each step the position of the nearest snapshot's, the earlier one on a tie; or so of timesteps.

    Args:
        steps: (rows,).
        snapshots: (K,), ascending.
    """
    after = np.searchsorted(snapshots, steps).clip(0, len(snapshots) - 1)
    before = (after - 1).clip(0)
    closer = np.abs(steps - snapshots[before]) <= np.abs(snapshots[after] - steps)
    return np.where(closer, before, after)
