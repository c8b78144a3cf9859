"""List the training samples that most influenced each query.

example: diffhook influence runs/butterflies --queries generated --top 10
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis import METHODS, Scores, influence
from diffhook.analysis.methods import DEFAULT
from diffhook.analysis.scores import Certainty, Top
from diffhook.cli.execution import add_execution, execution
from diffhook.cli.printing import print_json, print_table, sample_cell, tell
from diffhook.cli.values import check_writable
from diffhook.errors import ConfigurationError
from diffhook.log import open_log
from diffhook.log.samples import sample_words


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--queries", help="name of the query set")
    command.add_argument("--method", help=f'default {DEFAULT}; "help" lists them, without LOG')
    command.add_argument(
        "--source",
        help='which rows: "train", "probe", or a query set of training samples (default: the best there is)',
    )
    command.add_argument("--top", type=int, default=10, metavar="K", help="per query (default 10)")
    command.add_argument("--opponents", action="store_true", help="the lowest scores instead")
    command.add_argument(
        "--csv", metavar="FILE", help="write query, rank, sample, score (error, name) for all"
    )
    command.add_argument("--parquet", metavar="FILE", help="write all scores, a column per query")
    add_execution(command)


def run(args: argparse.Namespace) -> None:
    if args.method == "help":
        _help(args.json)
        return
    if args.log is None:
        raise ConfigurationError("LOG is missing; only `diffhook influence --method help` needs none")
    log = open_log(args.log)
    if args.queries is None:
        known = ", ".join(log.queries) or "none yet: see `diffhook query --help`"
        raise ConfigurationError(f"--queries is missing; the log has {known}")
    check_writable(args.csv, args.parquet)
    scores = influence(log, args.queries, args.method, args.source, execution=execution(args))
    tell(f"{scores.method}, {scores.source} rows: {scores.cost}")
    if scores.has_errors:
        tell(f"errors: {scores.certainty_cost}")
    if args.csv:
        scores.to_csv(args.csv)
    if args.parquet:
        scores.to_parquet(args.parquet)
    top = scores.top(args.top, opponents=args.opponents)
    certainty = scores.certainty(top, opponents=args.opponents)
    if args.json:
        found = _found(scores, top, certainty)
        print_json({"method": scores.method, "source": scores.source, "queries": found})
    else:
        title = f"influence on {args.queries} ({scores.method}, {scores.source} rows)"
        _print(title, scores, top, certainty)


def _found(scores: Scores, top: Top, certainty: Certainty | None) -> list[dict[str, Any]]:
    found = [
        {"query": int(query), "samples": ids.tolist(), "scores": values.tolist()}
        for query, ids, values in zip(scores.query_ids, top.sample_ids, top.scores, strict=True)
    ]
    if scores.names:
        for entry in found:
            entry["names"] = [sample_words(sample, scores.names) for sample in entry["samples"]]
    if certainty is not None:
        for row, entry in enumerate(found):
            beyond = certainty.beyond[row]
            entry |= {"errors": certainty.errors[row].tolist(), "beyond_noise": beyond.tolist()}
            if certainty.stability is not None:
                entry["stability"] = float(certainty.stability[row])
    return found


def _print(title: str, scores: Scores, top: Top, certainty: Certainty | None) -> None:
    columns: list[npt.NDArray[Any]] = [top.sample_ids, top.scores]
    header = ["query", "rank", "sample", "score"]
    if certainty is not None:
        columns += [certainty.errors, np.where(certainty.beyond, "", "within noise")]
        header += ["error", ""]
    listed = [
        (query, rank, sample_cell(sample, scores.names), *values)
        for query, *of_query in zip(scores.query_ids, *columns, strict=True)
        for rank, (sample, *values) in enumerate(zip(*of_query, strict=True), 1)
    ]
    reading = "Positive: training on the sample lowered the query's loss; negative: it raised it. " + (
        "No errors: noise was drawn once on the grid (diffhook query --replicates 2)."
        if certainty is None
        else "Error: one standard error over other draws of noise. Within noise: its 95% interval holds 0."
    )
    print_table(title, header, listed, reading)
    if certainty is not None:
        _print_certainty(scores, certainty)


def _print_certainty(scores: Scores, certainty: Certainty) -> None:
    """How many of each query's samples are beyond noise, and how many stay."""
    size = certainty.beyond.shape[1]
    counts = [f"{count} of {size}" for count in certainty.beyond.sum(1)]
    columns: list[Any] = [scores.query_ids, counts]
    header, reading = ["query", "beyond noise"], "Samples whose score's 95% interval does not hold 0."
    if certainty.stability is not None:
        columns.append(certainty.stability)
        header.append("share that stays")
        reading += (
            " Share of the listed samples that stay when one of the queries' noise replicates is left out."
        )
    print_table("certainty", header, list(zip(*columns, strict=True)), reading)


def _help(as_json: bool) -> None:
    methods = [METHODS[name] for name in sorted(METHODS)]
    if as_json:
        keys = ("name", "formula", "measurement", "reference")
        print_json([{key: getattr(method, key) for key in keys} for method in methods])
        return
    rows = [(m.name, m.formula, m.measurement, m.reference) for m in methods]
    print_table("methods", ["name", "formula", "gradients of", "reference"], rows)
