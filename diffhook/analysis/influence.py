"""Which training samples made this one: influence of every training sample on every query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.directions import query_directions, tell_broken
from diffhook.analysis.execution import MEMORY, Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.methods import Method, find_method
from diffhook.analysis.pairing import TRAIN, check_noise, kind_of
from diffhook.analysis.samples import sample_sums
from diffhook.analysis.score_pass import RowScores, ScorePass
from diffhook.analysis.scores import Scores
from diffhook.analysis.tables import check_gradients, query_table, source_table
from diffhook.log import RunLog


def influence(
    log: RunLog,
    queries: str,
    method: str | Method = "retrac",
    source: str = "train",
    *,
    client: Any = None,
    scheduler: Any = None,
    memory: int = MEMORY,
    progress: bool = False,
) -> Scores:
    """Score every training sample's influence on every query (arXiv 2401.09031 and its neighbours).

    A row of the training is set against the query's gradients at the snapshot nearest to its step.
    Nothing of the training side is computed again for another set of queries.

    Args:
        log: the run.
        queries: name of a query set made with :func:`diffhook.query`.
        method: a name, see ``diffhook influence --method help``, or a :class:`Method`.
        source: "train" for the training's own events, "probe" for the grid at snapshots, or the name
            of a query set that holds training samples under their ids.
        client: a dask.distributed Client; otherwise threads of this process.
        scheduler: another dask scheduler.
        memory: bytes that a process may hold.
        progress: show a bar, on a terminal.

    Raises:
        LogError: no such queries, or no rows.
        ConfigurationError: no such method or source, or one side holds other gradients than the
            method's: of another scalar, or with or without Adam's preconditioner.
    """
    execution = Execution(client, scheduler, memory, progress)
    prepared = prepare(log, queries, find_method(method), source, execution)
    tell_broken(query_table(log, queries), queries)
    rows = prepared.pass_.rows
    return Scores(prepared.query_ids, rows.sample_ids, prepared.method.name, prepared.pass_, log.names())


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the rows are scored."""

    method: Method
    query_ids: npt.NDArray[np.int64]
    pass_: ScorePass


def prepare(log: RunLog, queries: str, method: Method, source: str, execution: Execution) -> Prepared:
    """Read the queries, and of the training side what the method wants to know first."""
    table, asked = source_table(log, source, method=method), query_table(log, queries)
    check_gradients(log, method, source, queries)
    check_noise(log, source, queries)
    directions = query_directions(asked, method, own_noise=kind_of(source) == TRAIN)
    sample_ids = distinct_samples(table, execution)
    sums = factors = None
    if method.wants:
        sums = sample_sums(log, table, method, sample_ids, directions.steps, execution)
        factors = method.factors(sums)
    whole = method.turn(directions.whole, sums).astype(np.float32)
    without = None
    if directions.without is not None:
        without = np.stack([method.turn(part, sums) for part in directions.without]).astype(np.float32)
    rows = RowScores(method, sample_ids, directions.steps, factors, whole)
    return Prepared(method, directions.query_ids, ScorePass(table, rows, without, execution))
