"""Read everything in a log once and say what is damaged.

example: diffhook verify runs/butterflies
"""

from __future__ import annotations

import argparse

from diffhook.cli.printing import print_json
from diffhook.log import open_log


def arguments(command: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    problems = open_log(args.log).verify()
    if args.json:
        print_json({"problems": problems})
    else:
        print("\n".join(problems) or "whole: every row and snapshot can be read")
    return 1 if problems else 0
