"""Show how gradient norms depend on the timestep, and what that does to the rankings.

example: diffhook bias runs/butterflies
"""

from __future__ import annotations

import argparse

from diffhook.analysis import bias
from diffhook.analysis.bias import BiasReport
from diffhook.cli.execution import add_execution, execution
from diffhook.cli.printing import print_json, print_table
from diffhook.log import open_log

_BAR = 24  # characters


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--source",
        choices=("train", "probe"),
        help="which rows (default: norms of train, scores of the best)",
    )
    command.add_argument("--top", type=int, default=10, metavar="K", help="size of each query's top (10)")
    command.add_argument("--bins", type=int, default=20, help="timestep bins (20)")
    add_execution(command)


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    report = bias(log, args.source, k=args.top, bins=args.bins, execution=execution(args))
    if args.json:
        print_json(report.to_json())
        return
    _print_norms(report)
    if report.generality:
        share = report.generality[0].general_share
        print_table(
            f"How alike the top {args.top} of different queries are",
            ["queries", "method", "rows", "cardinality", "generally influential samples"],
            [(g.queries, g.method, g.source, g.cardinality, g.general_samples) for g in report.generality],
            "Cardinality 1: all different, but a random ranking has that too. Generally influential: in the "
            f"top of more than {share:.0%} of the queries.",
        )
    if report.dimension is not None:
        print(f"Projection: {report.dimension}.")


def _print_norms(report: BiasReport) -> None:
    from diffhook.report.parts.norms import ranges, sentences

    longest = max(b.median for b in report.norms)
    rows = []
    for timesteps, b in zip(ranges(report), report.norms, strict=True):
        bar = "█" * round(_BAR * b.median / longest)
        rows.append((" – ".join(timesteps), b.rows, b.lower, b.median, b.upper, bar))
    print_table(
        f"Gradient norm against timestep ({report.source} rows)",
        ["timesteps", "rows", "norm, 10%", "median", "90%", ""],
        rows,
        " ".join(sentences(report)),
    )
