"""Parses the command line. Exit statuses: 0 fine, 1 failure, 2 bad use or input, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from diffhook import __version__
from diffhook.cli import (
    alerts,
    bias,
    compact,
    evaluate,
    influence,
    info,
    merge,
    outliers,
    query,
    report,
    run,
    verify,
)
from diffhook.errors import DiffHookError
from diffhook.words import one_line

COMMANDS = (run, info, verify, compact, merge, outliers, query, influence, bias, report, alerts, evaluate)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="diffhook", description="See which training images drive a diffusion model."
    )
    root.add_argument("--version", action="version", version=f"diffhook {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary, _, example = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module is not run:  # what follows its script's name is the script's
            nargs = "?" if module is influence else None  # the list of its methods is of no log
            command.add_argument("log", metavar="LOG", nargs=nargs, help="the run's log: a folder or URL")
            command.add_argument("--json", action="store_true", help="print JSON for machines")
        module.arguments(command)
        command.set_defaults(run=module.run)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    parsed = parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed) or 0
    except DiffHookError as error:
        print(f"diffhook: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough
        return 0
    except KeyboardInterrupt:
        if parsed.run is run.run:  # the script's own affair
            raise
        print("diffhook: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # a path of the user's that cannot be written or read
        print(f"diffhook: {one_line(str(error))}", file=sys.stderr)
        return 2
    return status
