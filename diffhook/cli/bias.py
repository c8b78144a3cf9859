"""Show how gradient norms depend on the timestep, and what that does to the rankings.

example: diffhook bias runs/butterflies
"""

from __future__ import annotations

import argparse

from diffhook.analysis import bias
from diffhook.cli.printing import print_json, print_table
from diffhook.log import open_log


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--source", choices=("train", "probe"), default="train", help="which rows")
    command.add_argument("--top", type=int, default=10, metavar="K", help="size of each query's top (10)")
    command.add_argument("--bins", type=int, default=10, help="timestep bins (10)")


def run(args: argparse.Namespace) -> None:
    report = bias(open_log(args.log), args.source, k=args.top, bins=args.bins)
    if args.json:
        print_json(report.to_json())
        return
    rows = [(f"{b.low:g} – {b.high:g}", b.rows, b.median, b.lower, b.upper) for b in report.norms]
    reading = (
        f"Rank correlation of timestep and norm: {report.correlation:+.3f} (p = {report.p_value:.2g}). "
        "Away from 0, a sample's drawn timestep alone makes it look influential under TracIn."
    )
    header = ["timesteps", "rows", "median norm", "10%", "90%"]
    print_table(f"gradient norm against timestep ({args.source} rows)", header, rows, reading)
    if report.generality:
        print_table(
            f"how alike the top-{args.top} of different queries are",
            ["queries", "method", "cardinality", "generally influential samples"],
            [(g.queries, g.method, g.cardinality, g.general_samples) for g in report.generality],
            "Cardinality 1: all different (a random ranking has that too); generally influential: in the "
            f"top of more than {report.generality[0].general_share:.0%} of the queries.",
        )
