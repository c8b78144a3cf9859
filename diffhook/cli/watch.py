"""Show a live table of the samples while a run trains: visits, losses, norms, alerts.

A loss or norm of 1 is usual at its timestep, so that visits at different timesteps can be compared. Ends with
the run, or with Ctrl-C. Without a terminal, and with --json, the table is printed once.

example: diffhook watch runs/butterflies --sort norm --csv samples.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from diffhook.analysis.roles import ROLES
from diffhook.analysis.sample_table import ORDERS, SampleTable, sample_table
from diffhook.cli.interrupt import ctrl_c
from diffhook.cli.printing import print_json, print_table, sample_cell, table_of
from diffhook.cli.values import check_writable, count
from diffhook.log import RunLog, open_log
from diffhook.log.following import follow
from diffhook.words import plural

_HEADER = [
    "sample",
    "role",
    "visits",
    "last loss ×",
    "mean loss ×",
    "norm ×",
    "throttle",
    "alerts",
    "last alert",
]
_READING = "×: over the median at its timestep. High: the model cannot learn it, or it moves the model more."


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sort", choices=ORDERS, default="loss", help="highest first (default: mean loss)")
    command.add_argument("--role", choices=ROLES, help="only training images, or regularisation images")
    command.add_argument("--top", type=count, default=20, metavar="N", help="how many to show (default 20)")
    command.add_argument("--once", action="store_true", help="print the table once and exit")
    command.add_argument("--csv", metavar="FILE", help="write all samples as CSV, anew at each refresh")
    command.add_argument(
        "--interval", type=_seconds, default=5.0, metavar="SECONDS", help="between refreshes (default 5)"
    )


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    check_writable(args.csv)
    console = Console()
    if args.once or args.json or not console.is_terminal:
        _print(_look(log, args), args)
        return
    with ctrl_c() as pressed, Live(console=console, auto_refresh=False) as live:
        for _ in follow(log, args.interval, pressed):
            table = _look(log, args)
            shown = table_of(_HEADER, _rows(table, args.top))
            live.update(Group(Text(_title(table), style="bold"), shown, Text(_READING)), refresh=True)


def _look(log: RunLog, args: argparse.Namespace) -> SampleTable:
    table = sample_table(log).sort(args.sort)
    if args.role:
        table = table.of_role(args.role)
    if args.csv:
        table.to_csv(args.csv)
    return table


def _print(table: SampleTable, args: argparse.Namespace) -> None:
    if args.json:
        print_json({"title": _title(table), "samples": table.records(args.top)})
    else:
        print_table(_title(table), _HEADER, _rows(table, args.top), _READING)


def _title(table: SampleTable) -> str:
    visits, step = int(table.visits.sum()), int(table.last_step.max(initial=0))
    return f"{plural(len(table), 'sample')}, {plural(visits, 'visit')}, up to step {step:,}"


def _rows(table: SampleTable, top: int) -> list[Sequence[Any]]:
    return [
        (
            sample_cell(r["sample"], table.names),
            *(r[key] for key in ("role", "visits", "last_loss", "mean_loss", "norm")),
            r["factor"] if r["factor"] < 1 else "",
            *(r[key] for key in ("alerts", "last_alert")),
        )
        for r in table.records(top)
    ]


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 86_400:
        raise argparse.ArgumentTypeError(f"{text}; expected seconds, more than 0 and less than a day")
    return number
