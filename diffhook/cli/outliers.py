"""Rank the samples that are broken, mislabelled or foreign, or that drive the model alone.

example: diffhook outliers runs/butterflies --top 50 --csv outliers.csv --exclude 50 excluded.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Sequence

from diffhook.analysis import Execution, Ranking, outliers, self_influence
from diffhook.analysis.roles import ROLES
from diffhook.analysis.signals import SIGNALS
from diffhook.cli.execution import add_execution, execution
from diffhook.cli.printing import print_json, print_table, sample_cell
from diffhook.cli.values import check_writable, count, read_labels
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog, open_log


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--by",
        choices=("all", *(s.name for s in SIGNALS.values() if s.ranks), "self-tracin", "self-retrac"),
        default="all",
        help="the signals that count together (default), one of them, or bare self-influence",
    )
    command.add_argument(
        "--labels",
        metavar="FILE",
        help="labels by sample id, .npy or a line each: wrong ones are found without probes that try others",
    )
    command.add_argument("--source", choices=("train", "probe"), help="which rows (default: the best)")
    command.add_argument("--role", choices=ROLES, help="only training images, or regularisation images")
    command.add_argument("--top", type=count, default=20, metavar="K", help="how many to show (default 20)")
    command.add_argument("--csv", metavar="FILE", help="write the whole ranking as CSV")
    command.add_argument("--parquet", metavar="FILE", help="write the whole ranking as Parquet")
    command.add_argument(
        "--exclude",
        nargs=2,
        metavar=("K", "FILE"),
        help="write the first K, a line each: names of samples that have one, ids of the others",
    )
    command.add_argument("--html", metavar="FILE", help="write a page of this ranking")
    command.add_argument(
        "--images",
        metavar="PATH",
        help="the images by id: a folder, a saved dataset or .npy; by name in a folder where they have names",
    )
    add_execution(command)


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    if args.images is not None and args.html is None:
        raise ConfigurationError("--images are shown on a page: name its file with --html")
    check_writable(args.csv, args.parquet, args.html, args.exclude and args.exclude[1])
    labels = None if args.labels is None else read_labels(args.labels).tolist()
    where = execution(args)
    ranking = _ranking(log, args, labels, where)
    if args.role:
        ranking = ranking.of_role(args.role)
    if args.csv:
        ranking.to_csv(args.csv)
    if args.parquet:
        ranking.to_parquet(args.parquet)
    if args.exclude:
        many, path = args.exclude
        if not many.isdecimal():
            raise ConfigurationError(f"--exclude begins with {many!r}; expected how many to exclude")
        ranking.exclude(path, int(many))
    if args.html:
        from diffhook.report import write_page

        write_page(
            args.html,
            log,
            ranking,
            args.images,
            queries={},
            labels=labels,
            source=args.source,
            execution=where,
        )
    records = ranking.records(args.top)
    if args.json:
        print_json({"title": ranking.title, "samples": records})
        return
    role = ["role"] * bool(ranking.regularisation)
    rows = [
        (r["rank"], sample_cell(r["sample"], ranking.names), *map(r.get, role), r["score"], r["reasons"])
        for r in records
    ]
    print_table(ranking.title, ["rank", "sample", *role, "score", "reasons"], rows, _reading(args.by))


def _ranking(
    log: RunLog, args: argparse.Namespace, labels: Sequence[Hashable] | None, where: Execution
) -> Ranking:
    if args.by.startswith("self-"):
        return self_influence(log, args.by.removeprefix("self-"), args.source, execution=where)
    parts = None if args.by == "all" else [args.by]
    return outliers(log, args.source, parts, labels=labels, execution=where)


def _reading(by: str) -> str:
    if by.startswith("self-"):
        return "High: the sample moves the model by itself."
    return "Sum over the signals of −log10 of the chance of so high a value (Fisher's method)."
