"""Rank the samples that are broken, foreign, or pull the model alone.

example: diffhook outliers runs/butterflies --top 50 --csv outliers.csv --html page.html --images data/
"""

from __future__ import annotations

import argparse

from diffhook.analysis import outliers, self_influence
from diffhook.cli.printing import print_json, print_table
from diffhook.log import open_log

RANKINGS = ("norm", "tracin", "retrac")


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--by",
        choices=RANKINGS,
        default="norm",
        help="gradient norm standardised within timestep bins (default), or self-influence",
    )
    command.add_argument("--source", choices=("train", "probe"), default="train", help="which rows")
    command.add_argument("--top", type=int, default=20, metavar="K", help="how many to show (default 20)")
    command.add_argument("--csv", metavar="FILE", help="write the whole ranking as CSV")
    command.add_argument("--html", metavar="FILE", help="write a contact sheet")
    command.add_argument("--images", metavar="PATH", help="the dataset's images: a folder or .npy, by id")


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    by_norm = args.by == "norm"
    ranking = outliers(log, args.source) if by_norm else self_influence(log, args.by, args.source)
    if args.csv:
        ranking.to_csv(args.csv)
    if args.html:
        from diffhook.report import write_page

        write_page(args.html, log, ranking, args.images, queries={}, source=args.source)
    records = ranking.records(max(args.top, 0))
    if args.json:
        print_json({"title": ranking.title, "samples": records})
        return
    rows = [(r["rank"], r["sample"], r["score"], r["flags"]) for r in records]
    reading = "High: the sample pulls the model harder than others do at the same timesteps."
    print_table(ranking.title, ["rank", "sample", "score", "reasons"], rows, reading)
