"""Say what a log holds.

example: diffhook info runs/butterflies
"""

from __future__ import annotations

import argparse

from diffhook.cli.printing import print_json, print_table
from diffhook.log import open_log


def arguments(command: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    log = open_log(args.log)
    identity = log.config["identity"]
    projection = identity["projection"]
    facts = {
        "log": log.location,
        "model": identity["model"]["class"],
        "trained parameters": len(identity["parameters"]),
        "projection": projection["kind"],
        "projection dimension": projection["dim"],
        "train rows": len(log.train),
        "probe rows": len(log.probe),
        "queries": {name: len(table) for name, table in log.queries.items()},
        "snapshots": [snapshot.step for snapshot in log.snapshots],
        "alerts": len(log.alerts()),
        "holds images": False,
    }
    if args.json:
        print_json(facts)
        return
    rows = [(name, _words(value)) for name, value in facts.items()]
    print_table("", ["", "value"], rows, "A log holds gradients and weights, never the images themselves.")


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} ({rows} rows)" for name, rows in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
