"""Put the parts of one run that lie in several logs (other ranks, steps or queries) into one.

example: diffhook merge node-0/run node-1/run --out runs/butterflies
"""

from __future__ import annotations

import argparse

from diffhook.cli.compact import tell
from diffhook.log.compaction import merge


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("others", nargs="+", metavar="OTHER", help="the other parts")
    command.add_argument("--out", required=True, metavar="NEW", help="where the whole appears")


def run(args: argparse.Namespace) -> None:
    merge([args.log, *args.others], args.out)
    tell(args)
