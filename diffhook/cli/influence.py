"""List the training samples that most influenced each query.

example: diffhook influence runs/butterflies --queries generated --method retrac --top 10
"""

from __future__ import annotations

import argparse

from diffhook.analysis import METHODS, influence
from diffhook.cli.printing import print_json, print_table
from diffhook.errors import ConfigurationError
from diffhook.log import open_log


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--queries", help="name of the query set")
    command.add_argument("--method", default="retrac", help='default "retrac"; "help" lists them')
    command.add_argument("--source", choices=("train", "probe"), default="train", help="which rows")
    command.add_argument("--top", type=int, default=10, metavar="K", help="per query (default 10)")
    command.add_argument("--opponents", action="store_true", help="the lowest scores instead")
    command.add_argument("--csv", metavar="FILE", help="write query, rank, sample, score for all samples")
    command.add_argument("--scheduler", metavar="ADDRESS", help="a dask scheduler, tcp://host:port")


def run(args: argparse.Namespace) -> None:
    if args.method == "help":
        rows = [(m.name, m.formula, m.source) for m in METHODS.values()]
        print_table("methods", ["name", "formula", "source"], rows)
        return
    log = open_log(args.log)
    if args.queries is None:
        known = ", ".join(log.queries) or "none yet: see `diffhook query --help`"
        raise ConfigurationError(f"--queries is missing; the log has {known}")
    client = _client(args.scheduler)
    scores = influence(log, args.queries, args.method, args.source, client=client)
    if args.csv:
        scores.to_csv(args.csv)
    top = scores.top(args.top, opponents=args.opponents)
    if args.json:
        found = [
            {"query": int(q), "samples": ids.tolist(), "scores": values.tolist()}
            for q, ids, values in zip(scores.query_ids, *top, strict=True)
        ]
        print_json({"method": args.method, "source": args.source, "queries": found})
        return
    listed = [
        (q, rank, sample, float(score))
        for q, ids, values in zip(scores.query_ids, *top, strict=True)
        for rank, (sample, score) in enumerate(zip(ids, values, strict=True), 1)
    ]
    title = f"influence on {args.queries} ({args.method}, {args.source} rows)"
    reading = "Positive: training on the sample lowered the query's loss; negative: it raised it."
    print_table(title, ["query", "rank", "sample", "score"], listed, reading)


def _client(address: str | None) -> object:
    if address is None:
        return None
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise ConfigurationError("--scheduler needs dask.distributed: pip install distributed") from error
    return Client(address)
