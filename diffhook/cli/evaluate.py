"""Judge scores: against known sources, known outliers, and retrained models.

example: diffhook evaluate runs/butterflies --queries generated --record retrained.jsonl --subsets 64 \\
             --train train.py:train --measure train.py:losses --processes 2
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis import Scores, influence, outliers
from diffhook.analysis import evaluation as judge
from diffhook.analysis.methods import COMPARED
from diffhook.analysis.score_pass import strongest
from diffhook.cli.execution import add_execution, execution
from diffhook.cli.printing import print_json, print_table
from diffhook.cli.values import read_array, read_labels, read_lines
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog, open_log
from diffhook.log.samples import ROLE

_INDICES = 10_000_000  # ids up to here are taken for a dataset's indices, unless the log has names


def arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--queries", metavar="NAME", help="the query set whose scores are judged")
    add(
        "--methods", nargs="+", default=list(COMPARED), metavar="METHOD", help=f"default {' '.join(COMPARED)}"
    )
    add("--source", help="which rows to score (default: the best there is)")
    add("--top", type=int, default=10, metavar="K", help="strongest samples per query (10)")
    add("--sources", metavar="FILE", help="source or label of every sample, by id: .npy, or a line each")
    add("--query-sources", metavar="FILE", help="the queries' own, likewise: gives tracing precision")
    add("--outliers", metavar="FILE", help="ids of known outliers: gives AUROC and average precision")
    add(
        "--train",
        metavar="FILE.py:NAME",
        help="function (ids in order) -> model, for LDS and removal; the "
        "log's names() say what the ids of named samples are",
    )
    add("--measure", metavar="FILE.py:NAME", help="function model -> (Q,) losses of the queries")
    add(
        "--record",
        metavar="FILE",
        help="JSON lines of trainings; finished ones are not run again. It belongs to one --train and "
        "--measure: after a change of either, name another file",
    )
    add("--subsets", type=int, default=64, metavar="M", help="half-subsets for LDS (64)")
    add("--seeds", type=int, default=1, metavar="N", help="trainings of each; 2 or more give the ceiling (1)")
    add(
        "--remove",
        action="store_true",
        help="retrain without each query's top, and as many at random",
    )
    add("--processes", type=int, default=1, metavar="P", help="trainings at the same time (1)")
    add_execution(command)


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    rows: list[dict[str, Any]] = []
    if args.outliers:
        rows += _detection(log, args)
    if args.queries:
        where = execution(args)
        scored = {m: influence(log, args.queries, m, args.source, execution=where) for m in args.methods}
        rows += _tracing(scored, args) if args.sources or args.query_sources else []
        ids = _trained_on(log, scored)
        rows += _lds(scored, ids, args) if args.train or args.record else []
        rows += _removal(scored, ids, args) if args.remove else []
    if not rows:
        raise ConfigurationError(
            "nothing to judge by: expected --outliers; or --queries with --sources and --query-sources, "
            "with --record, or with --train and --measure"
        )
    if args.json:
        print_json(rows)
        return
    table = [(r["scores"], r["figure"], r["value"], r.get("error", ""), r.get("beside", "")) for r in rows]
    reading = (
        "Errors: bootstrap over queries (and subsets). Beside: what a perfect or a random ranking would get."
    )
    print_table("evaluation", ["scores", "figure", "value", "error", "beside"], table, reading)


def _row(scores: str, figure: str, estimate: Any, beside: str = "") -> dict[str, Any]:
    mean, error = estimate
    return {"scores": scores, "figure": figure, "value": mean, "error": error, "beside": beside}


def _detection(log: RunLog, args: argparse.Namespace) -> list[dict[str, Any]]:
    ranking = outliers(log, args.source, execution=execution(args))
    found = judge.detection(ranking, _ids(args.outliers))
    base = f"at random {found.base_rate:.3f}"
    return [
        {"scores": "outliers", "figure": "AUROC", "value": found.auroc, "beside": "at random 0.5"},
        {
            "scores": "outliers",
            "figure": "average precision",
            "value": found.average_precision,
            "beside": base,
        },
    ]


def _tracing(scored: dict[str, Scores], args: argparse.Namespace) -> list[dict[str, Any]]:
    if not (args.sources and args.query_sources):
        raise ConfigurationError("tracing needs both --sources and --query-sources")
    own, asked = read_labels(args.sources), read_labels(args.query_sources)
    rows = []
    for method, scores in scored.items():
        found = judge.tracing(_top(scores, args.top), own, asked)
        chance = f"at random {found.chance:.3f}"
        rows.append(_row(method, f"top-{args.top} of the query's source", found.precision, chance))
        cardinality = {"scores": method, "figure": f"top-{args.top} cardinality", "value": found.cardinality}
        rows.append(cardinality | {"beside": "at random about 1"})
    return rows


def _trained_on(log: RunLog, scored: dict[str, Scores]) -> npt.NDArray[np.int64]:
    """Ids to train on, ascending: the dataset's indices up to the highest, or those that have rows where
    ids are no indices but hashes of names, or keys. Class images and other further rows are no samples."""
    known = np.unique(np.concatenate([scores.sample_ids for scores in scored.values()]))
    known = known[known < ROLE]
    indices = not log.names() and known[-1] < _INDICES
    return np.arange(known[-1] + 1) if indices else known


def _lds(
    scored: dict[str, Scores], ids: npt.NDArray[np.int64], args: argparse.Namespace
) -> list[dict[str, Any]]:
    queries = len(next(iter(scored.values())).query_ids)
    if args.train:
        retrained = judge.retrain(
            _function(args.train, "--train"),
            _function(args.measure, "--measure"),
            judge.half_subsets(ids, args.subsets),
            seeds=range(args.seeds),
            queries=queries,
            record=args.record,
            processes=args.processes,
        )
    else:
        retrained = judge.read_retrained(args.record)
    unknown = np.setdiff1d(np.concatenate(retrained.subsets), ids)
    if len(unknown):
        raise ConfigurationError(
            f"a subset of {args.record} names sample {unknown[0]}, which the log does not know: expected "
            "trainings on its samples"
        )
    subsets = [np.searchsorted(ids, subset) for subset in retrained.subsets]
    rows = []
    for method, scores in scored.items():
        found = judge.lds(_at(ids, scores), subsets, -retrained.losses)
        ceiling = f"another seed {found.ceiling}" if found.ceiling else ""
        rows.append(_row(method, f"LDS over {len(subsets)} subsets", found.mean, ceiling))
    return rows


def _removal(
    scored: dict[str, Scores], ids: npt.NDArray[np.int64], args: argparse.Namespace
) -> list[dict[str, Any]]:
    train, measure = _function(args.train, "--train"), _function(args.measure, "--measure")
    rows = []
    for method, scores in scored.items():
        found = judge.removal(
            train,
            measure,
            _top(scores, args.top),
            ids,
            seeds=range(args.seeds),
            record=args.record and f"{args.record}.removal",
            processes=args.processes,
        )
        control = f"random removal {found.control}"
        rows.append(_row(method, f"loss rise without the top {args.top}", found.effect, control))
    return rows


def _at(ids: npt.NDArray[np.int64], scores: Scores) -> npt.NDArray[np.float32]:
    """(Q, ids): samples without rows have no influence."""
    values = np.zeros((len(scores.query_ids), len(ids)), np.float32)
    own = scores.sample_ids < ROLE
    values[:, np.searchsorted(ids, scores.sample_ids[own])] = scores.values[:, own]
    return values


def _top(scores: Scores, k: int) -> npt.NDArray[np.int64]:
    """(Q, k) ids of the strongest samples, without further rows such as class images."""
    if scores.sample_ids[-1] < ROLE:
        return scores.top(k).sample_ids
    own = scores.sample_ids < ROLE
    return scores.sample_ids[own][strongest(scores.values[:, own], k)]


def _ids(path: str) -> npt.NDArray[np.int64]:
    """Of a .npy array, or of a text file, with blanks or newlines between them."""
    found = read_array(path) if path.endswith(".npy") else " ".join(read_lines(path)).split()
    try:
        return np.array([int(each) for each in found], np.int64)
    except (ValueError, OverflowError) as error:
        raise ConfigurationError(f"{path} holds no sample ids, an integer a line: {error}") from error


def _function(name: str | None, option: str) -> Callable[..., Any]:
    """The function that FILE.py:NAME names; its module importable by the processes that train."""
    file, _, function = (name or "").rpartition(":")
    path = Path(file)
    if not function or path.suffix != ".py" or not path.is_file():
        raise ConfigurationError(f"{option} is {name!r}; expected FILE.py:NAME of a function")
    sys.path.insert(0, str(path.parent.resolve()))
    found = getattr(importlib.import_module(path.stem), function, None)
    if not callable(found):
        raise ConfigurationError(f"{path} has no function {function!r}")
    return found
