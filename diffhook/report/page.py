"""One self-contained HTML page about a run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis import Ranking, Scores, bias, influence, influence_by_timestep, outliers
from diffhook.analysis.bias import Generality, generality
from diffhook.analysis.defaults import as_log, best_source
from diffhook.analysis.execution import HERE, Execution
from diffhook.analysis.methods import COMPARED
from diffhook.analysis.tables import loss_queries
from diffhook.console import progress_bar
from diffhook.errors import LogError
from diffhook.log import RunLog
from diffhook.log.samples import short_names
from diffhook.log.store import Location
from diffhook.report.explorer import Explorer
from diffhook.report.images import find_images, images_of_run
from diffhook.report.parts.alerts import alerts_part
from diffhook.report.parts.generality import generality_part
from diffhook.report.parts.norms import norms_part
from diffhook.report.parts.outliers import outliers_part
from diffhook.report.parts.queries import TimestepShares, queries_part, shown
from diffhook.report.parts.run import run_part
from diffhook.report.rendering import Part, check_page_path, write_parts
from diffhook.report.thumbnails import PictureCache

_QUERIES = 100  # of a set
_TOP = 10  # of each query, for cardinality
_SHARE = 0.5  # of the queries, for generally influential samples


def write_page(
    path: str | Path,
    log: RunLog | Location,
    ranking: Ranking | None = None,
    images: Any = None,
    *,
    queries: Mapping[str, Any] | None = None,
    labels: Mapping[int, Hashable] | Sequence[Hashable] | None = None,
    source: str | None = None,
    top: int = 500,
    k: int = 8,
    title: str = "",
    execution: Execution = HERE,
) -> int:
    """Write the page. It needs no network, and asks for none.

    Args:
        path: the HTML file.
        log: the run that it is about, or where it lies.
        ranking: whose samples make the gallery; by default :func:`diffhook.outliers`.
        images: the training images, as :func:`~diffhook.report.images.find_images` takes them; by
            default the log's own thumbnails, if it has any.
        queries: the query sets to show, each with its images or None; by default all that
            :func:`~diffhook.analysis.tables.loss_queries` names, without.
        labels: of the samples, by id or in the dataset's order, to filter by and as
            :func:`diffhook.outliers` takes them.
        source: rows to score and to rank, "train" or "probe"; by default the best there is.
        top: samples of the gallery whose pictures are large; the others' are those of the map, of the first
            20,000 samples.
        k: proponents and opponents of each query.
        title: heading; by default the log's place.
        execution: as for :func:`diffhook.influence`.

    Returns:
        The file's size in bytes.

    Raises:
        LogError, ConfigurationError: as the scores and the images raise them; none of the images can
            be read; matplotlib is missing.
    """
    check_page_path(path)
    log = as_log(log)
    known = labels if labels is None or isinstance(labels, Mapping) else dict(enumerate(labels))
    ranking = outliers(log, source, labels=known, execution=execution) if ranking is None else ranking
    asked = dict.fromkeys(loss_queries(log)) if queries is None else dict(queries)
    found, files = images_of_run(log, images, ranking.sample_ids, execution)
    ranking, thumbnails = replace(ranking, names=ranking.names or files), PictureCache(found)
    names = short_names(ranking.names)
    placed_by = source or best_source(log, execution=execution)
    explorer = Explorer.make(log, ranking, found, placed_by, known, execution) if len(ranking) else None
    scores = {name: _scores(log, name, source, names, execution) for name in asked}
    with progress_bar(execution.progress) as bar:
        for sample in bar.track(ranking.sample_ids[:top].tolist(), description="thumbnails"):
            thumbnails(sample)
    parts = [
        run_part(log),
        outliers_part(ranking, thumbnails, top, explorer=explorer),
        *_queries(log, asked, scores, thumbnails, k, execution),
        _norms(log, source, execution),
        generality_part(_generality(scores), scores, thumbnails),
        alerts_part(log.alerts(), _last_step(log), thumbnails, names),
    ]
    thumbnails.check()
    return write_parts(path, title, log.location, parts)


def _scores(
    log: RunLog, name: str, source: str | None, names: Mapping[int, str], execution: Execution
) -> list[Scores]:
    each_method = (influence(log, name, method, source, execution=execution) for method in COMPARED)
    found = [replace(scores, names=names) for scores in each_method]
    for each in found:
        _ = each.values  # one pass over the rows; all that follows reads it
    return found


def _queries(
    log: RunLog,
    asked: Mapping[str, Any],
    scores: Mapping[str, list[Scores]],
    thumbnails: PictureCache,
    k: int,
    execution: Execution,
) -> list[Part | None]:
    found = []
    for index, (name, group) in enumerate(scores.items()):
        pictures = PictureCache(find_images(asked[name], group[0].query_ids), 128)
        when = [_timesteps(log, name, each, shown(each, k), execution) for each in group]
        part = queries_part(name, group, thumbnails, pictures, k=k, queries=_QUERIES, timesteps=when)
        pictures.check()
        found.append(part and replace(part, anchor=f"queries-{index}"))
    return found


def _timesteps(
    log: RunLog, name: str, scores: Scores, ids: npt.NDArray[np.int64], execution: Execution
) -> TimestepShares:
    found = influence_by_timestep(
        log, name, ids, method=scores.method, source=scores.source, bins=20, execution=execution
    )
    return TimestepShares(found.values, found.edges)


def _generality(scores: Mapping[str, list[Scores]]) -> list[Generality]:
    """Of sets of two queries or more: one is like itself."""
    return [
        generality(each, name, _TOP, _SHARE)
        for name, group in scores.items()
        for each in group
        if len(each.query_ids) > 1
    ]


def _last_step(log: RunLog) -> int:
    steps = (log.train.read(block, "step") for block in log.train.blocks())
    return max((int(step.max(initial=0)) for step in steps), default=0)


def _norms(log: RunLog, source: str | None, execution: Execution) -> Part | None:
    try:
        return norms_part(bias(log, source, queries=(), execution=execution))
    except LogError:  # too few rows to say anything
        return None
