"""List the training samples that most influenced each query.

example: diffhook influence runs/butterflies --queries generated --method retrac --top 10
"""

from __future__ import annotations

import argparse

from diffhook.analysis import METHODS, Scores, influence
from diffhook.cli.execution import add_execution, execution
from diffhook.cli.printing import print_json, print_table, tell
from diffhook.errors import ConfigurationError
from diffhook.log import open_log


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--queries", help="name of the query set")
    command.add_argument("--method", default="retrac", help='default "retrac"; "help" lists them, without LOG')
    command.add_argument(
        "--source", default="train", help='which rows: "train", "probe", or a query set of training samples'
    )
    command.add_argument("--top", type=int, default=10, metavar="K", help="per query (default 10)")
    command.add_argument("--opponents", action="store_true", help="the lowest scores instead")
    command.add_argument("--stability", action="store_true", help="how much of each top survives other noise")
    command.add_argument("--csv", metavar="FILE", help="write query, rank, sample, score for all samples")
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
    scores = influence(log, args.queries, args.method, args.source, **execution(args))
    tell(f"{args.method}: {scores.cost}")
    if args.csv:
        scores.to_csv(args.csv)
    if args.parquet:
        scores.to_parquet(args.parquet)
    top = scores.top(args.top, opponents=args.opponents)
    stability = _stability(scores, args.top) if args.stability else None
    if args.json:
        found = [
            {
                "query": int(q),
                "samples": ids.tolist(),
                "scores": values.tolist(),
                **({} if stability is None else {"stability": stability[row]}),
            }
            for row, (q, ids, values) in enumerate(zip(scores.query_ids, *top, strict=True))
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
    if stability is not None:
        shares = zip(scores.query_ids, stability, strict=True)
        reading = "Share of the top that stays when one of the queries' noise replicates is left out."
        print_table("stability", ["query", "share"], list(shares), reading)


def _help(as_json: bool) -> None:
    methods = [METHODS[name] for name in sorted(METHODS)]
    if as_json:
        keys = ("name", "formula", "measurement", "source")
        print_json([{key: getattr(method, key) for key in keys} for method in methods])
        return
    rows = [(m.name, m.formula, m.measurement, m.source) for m in methods]
    print_table("methods", ["name", "formula", "gradients of", "source"], rows)


def _stability(scores: Scores, k: int) -> list[float]:
    found = scores.stability(k)
    if found is None:
        raise ConfigurationError(
            "--stability needs queries with several noise replicates: diffhook query --replicates 4"
        )
    return [float(share) for share in found]
