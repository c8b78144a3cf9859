"""List the alerts raised while the model trained, or follow them while it trains.

example: diffhook alerts runs/butterflies --follow
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from diffhook import words
from diffhook.cli.interrupt import ctrl_c
from diffhook.cli.printing import print_json, print_table
from diffhook.cli.values import count
from diffhook.log import RunLog, open_log
from diffhook.log.following import follow_alerts

_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--top", type=count, default=50, metavar="K", help="the last K (default 50)")
    command.add_argument(
        "--follow",
        action="store_true",
        help="show them as they come, from all processes, until the run or Ctrl-C ends",
    )


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    if args.follow:
        with ctrl_c() as pressed:
            _follow(log, args.top, args.json, pressed)
        return
    alerts = log.alerts()
    shown = alerts[-args.top :] if args.top > 0 else []
    if args.json:
        print_json(shown)
        return
    rows = [(a["step"], a["level"], a["kind"], a["message"]) for a in shown]
    print_table(f"{len(alerts)} alerts, the last {len(rows)}", ["step", "level", "kind", "message"], rows)


def _follow(log: RunLog, top: int, as_json: bool, stopped: Callable[[], bool]) -> None:
    console = Console(soft_wrap=True)
    looks = follow_alerts(log, stopped=stopped)
    for number, alerts in enumerate(looks):
        for alert in alerts if number else alerts[max(len(alerts) - top, 0) :]:
            if as_json:
                print(json.dumps(alert), flush=True)
            else:
                console.print(_line(alert, log.ranks))


def _line(alert: dict[str, Any], ranks: int) -> Text:
    where = f"step {alert['step']}" + (f", rank {alert.get('rank', 0)}" if ranks > 1 else "")
    line = Text(f"{where}  ")
    line.append(words.one_line(str(alert["kind"])), style=_STYLES.get(alert["level"], ""))
    return line.append(f"  {words.one_line(str(alert['message']))}")
