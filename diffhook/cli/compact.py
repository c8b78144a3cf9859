"""Copy a log into a smaller one: whole shards, only the rows that count, or sums of them.

example: diffhook compact runs/butterflies --out runs/butterflies-small --dim 512 --aggregate retrac
"""

from __future__ import annotations

import argparse

from diffhook.analysis.aggregation import Aggregation, summable_methods
from diffhook.cli.info import describe
from diffhook.cli.printing import print_json
from diffhook.log import open_log
from diffhook.log.compaction import compact


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="NEW", help="where the copy appears")
    command.add_argument(
        "--aggregate",
        choices=summable_methods(),
        help="one row for each sample and snapshot: scores of this method stay as they are, and nothing else "
        "can be told any more",
    )
    command.add_argument("--dim", type=int, metavar="D", help="fold projections to a divisor of their D")


def run(args: argparse.Namespace) -> None:
    aggregation = Aggregation(args.aggregate) if args.aggregate else None
    compact(args.log, args.out, dim=args.dim, aggregation=aggregation)
    tell(args)


def tell(args: argparse.Namespace) -> None:
    """Say what the copy holds."""
    log = open_log(args.out)
    if args.json:
        print_json(describe(log))
    else:
        print(f"{args.out}: {len(log.train):,} train rows, {len(log.probe):,} probe rows")
