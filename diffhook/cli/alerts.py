"""List the alerts raised while the model trained.

example: diffhook alerts runs/butterflies
"""

from __future__ import annotations

import argparse

from diffhook.cli.printing import print_json, print_table
from diffhook.log import open_log


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--top", type=int, default=50, metavar="K", help="the last K (default 50)")


def run(args: argparse.Namespace) -> None:
    alerts = open_log(args.log).alerts()
    shown = alerts[-args.top :] if args.top > 0 else []
    if args.json:
        print_json(shown)
        return
    rows = [(a["step"], a["kind"], a["message"]) for a in shown]
    print_table(f"{len(alerts)} alerts, the last {len(rows)}", ["step", "kind", "message"], rows)
