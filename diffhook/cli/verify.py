"""Read everything in a log once and say what is damaged, and which rows that costs.

example: diffhook verify runs/butterflies --repair
"""

from __future__ import annotations

import argparse

from zarr.abc.store import Store

from diffhook import words
from diffhook.cli.printing import print_json
from diffhook.console import progress_bar
from diffhook.log import open_log
from diffhook.log import store as files
from diffhook.log.repair import repair
from diffhook.log.verification import Finding, count_steps, repaired, verify


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--repair",
        action="store_true",
        help="move what is damaged to LOG/quarantine, so that the rest can be read",
    )


def run(args: argparse.Namespace) -> int:
    store = open_log(args.log).store
    with progress_bar() as bar:
        task = bar.add_task("verifying", total=count_steps(store))
        findings = verify(store, lambda: bar.advance(task))
    done = _repair(open_log(args.log).writable_store(), findings) if args.repair and findings else []
    left = verify(store) if done else findings
    notes = repaired(store) if not left else []
    if args.json:
        told = {"problems": [str(f) for f in findings], "repairs": done, "left": [str(f) for f in left]}
        print_json({**told, "notes": notes})
    else:
        for line in [*map(str, findings), *done, *notes]:
            print(words.one_line(line))
        if not left:
            print("whole: every row and snapshot can be read")
    return 1 if left else 0


def _repair(store: Store, findings: list[Finding]) -> list[str]:
    with files.refusals(store):
        return repair(store, findings)
