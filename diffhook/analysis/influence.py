"""Which training samples made this one: influence of every training sample on every query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.defaults import as_log, best_source, default_method
from diffhook.analysis.directions import Directions, query_directions, tell_broken
from diffhook.analysis.draws import Draws
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.analysis.methods import Method, SampleSums, WhitenedReTrac, find_method
from diffhook.analysis.pairing import PROBE, SOURCES, TRAIN, check_noise, holds_replicates, kind_of
from diffhook.analysis.row_scores import RowScores
from diffhook.analysis.sample_sums import sample_sums
from diffhook.analysis.score_pass import ScorePass
from diffhook.analysis.scores import Scores
from diffhook.analysis.second_moment import change_without
from diffhook.analysis.tables import check_gradients, check_query_name, query_table, source_table
from diffhook.log import RunLog, Table
from diffhook.log.store import Location

Floats = npt.NDArray[np.floating[Any]]


def influence(
    log: RunLog | Location,
    queries: str,
    method: str | Method | None = None,
    source: str | None = None,
    *,
    execution: Execution = HERE,
) -> Scores:
    """Score every training sample's influence on every query (arXiv 2401.09031 and its neighbours).

    A row of the training is set against the query's gradients at the snapshot nearest to its step; by the
    default method, an event against those at timesteps near its own.
    Nothing of the training side is computed again for another set of queries.

    Args:
        log: the run, or where it lies.
        queries: name of a query set made with :func:`diffhook.query`.
        method: a name, see ``diffhook influence --method help``, or a :class:`Method`. By default
            "whitened-retrac", which predicts best what retrained models do; "tracin" and "retrac" are the
            paper's.
        source: "train" for the training's own events, "probe" for the grid at snapshots, or the name
            of a query set that holds training samples under their ids. By default the best there is for
            these queries: probes, where they hold all samples that were trained on; the result names it.
        execution: where it runs, how much memory it may take, and whether it shows its progress.

    Raises:
        LogError: no such queries, or no rows.
        ConfigurationError: no such method or source, or one side holds other gradients than the
            method's: of another scalar, with or without Adam's preconditioner, or with noise that does not
            fit the other side's.
    """
    check_query_name(queries)
    log = as_log(log)
    prepared = prepare(log, queries, method, source, execution)
    tell_broken(query_table(log, queries), queries)
    rows = prepared.pass_.rows
    return Scores(
        prepared.query_ids,
        rows.sample_ids,
        prepared.method.name,
        prepared.source,
        prepared.pass_,
        log.names(),
        log.thumbnails,
    )


@dataclass(frozen=True)
class PreparedScoring:
    """Everything that is known before the rows are scored."""

    method: Method
    source: str
    directions: Directions
    sums: SampleSums | None
    pass_: ScorePass

    @property
    def query_ids(self) -> npt.NDArray[np.int64]:
        return self.directions.query_ids


def prepare(
    log: RunLog, queries: str, method: str | Method | None, source: str | None, execution: Execution
) -> PreparedScoring:
    """Read the queries, and of the training side what the method requires first."""
    method = find_method(default_method(log) if method is None else method)
    asked = query_table(log, queries)
    source = best_source(log, queries, execution) if source is None else source
    table = source_table(log, source, method=method)
    check_gradients(log, method, source, queries)
    check_noise(log, source, queries)
    kind = kind_of(source)
    directions = query_directions(asked, method, own_noise=kind == TRAIN)
    sample_ids = distinct_samples(table, execution)
    sums = factors = None
    if method.requires:
        sums = sample_sums(log, table, method, sample_ids, directions.steps, execution)
        factors = method.factors(sums)
    summed = source in SOURCES and "aggregate" in log.config["identity"]  # sums know of no draws
    leave_outs = directions.leave_outs
    again = 0 if leave_outs is None else leave_outs.replicates
    paired = kind == PROBE and not summed and holds_replicates(log, source, again)
    whole, without = _transformed(method, directions, sums)
    if without is not None and paired and sums is not None and isinstance(method, WhitenedReTrac):
        without = _with_their_moment(table, method, directions, sums, execution)
    rows = RowScores(method, sample_ids, directions.steps, directions.centres, factors, whole)
    draws = Draws(
        leave_outs,
        without,
        paired=paired,
        by_row=kind == TRAIN and not summed,
        variance_share=partial(method.variance_share, sums, len(directions.steps)),
    )
    known = draws if draws.by_row or leave_outs is not None else None
    return PreparedScoring(method, source, directions, sums, ScorePass(table, rows, known, execution))


def _transformed(
    method: Method, directions: Directions, sums: SampleSums | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """(K, C, Q, D) and, where there are replicates, (L, K, C, Q, D)."""
    all_at_once = partial(_all_at_once, method.transform_queries, sums)
    if directions.without is None:
        return all_at_once([directions.whole])[0], None
    whole, *without = all_at_once([directions.whole, *directions.without])
    return whole, np.stack(without)


def _all_at_once(
    transform: Callable[[Floats, SampleSums | None], Floats],
    sums: SampleSums | None,
    parts: Sequence[Floats],
) -> list[npt.NDArray[np.float32]]:
    """Each of (K, C, Q, D), transformed, in one call: a method may solve a large system."""
    snapshots, *_, dim = parts[0].shape
    flat = np.concatenate([part.reshape(snapshots, -1, dim) for part in parts], axis=1)
    found = np.split(transform(flat, sums).astype(np.float32), len(parts), axis=1)
    return [np.ascontiguousarray(part).reshape(parts[0].shape) for part in found]


def _with_their_moment(
    table: Table,
    method: WhitenedReTrac,
    directions: Directions,
    sums: SampleSums,
    execution: Execution,
) -> npt.NDArray[np.float32]:
    """(L, K, C, Q, D) the queries without a leave-out, whitened by the second moment G without it, too.

    To first order in the change of G: (G + Δ + λI)⁻¹ φ = H (φ − Δ H φ), with H = (G + λI)⁻¹, and once more
    for the other side. The draws are those of all samples, so they move G as much as they move a sample's
    mean.
    """
    assert directions.leave_outs is not None
    assert directions.without is not None
    once = partial(_all_at_once, method.whitened_once, sums)
    whole, parts = directions.whole, directions.without
    for _ in range(2):
        (whole,) = once([whole])
        vectors = whole.reshape(-1, whole.shape[-1])
        change = change_without(table, method, directions.leave_outs, vectors, execution)
        parts = np.stack(once(list(parts - change.reshape(parts.shape))))
    return parts
