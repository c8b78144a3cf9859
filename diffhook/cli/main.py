"""Parses the command line. Exit statuses: 0 fine, 1 failure, 2 bad use or input, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from diffhook import __version__
from diffhook.errors import DiffHookError
from diffhook.words import one_line

# A module each in this folder, imported when it is asked for: dask and scipy alone take a second to load.
COMMANDS = {
    "run": "Run a training script with the hook on its Accelerator; the script stays as it is.",
    "info": "Say what a log holds, before one uses or shares it.",
    "verify": "Read everything in a log once and say what is damaged, and which rows that costs.",
    "compact": "Copy a log into a smaller one: whole shards, only the rows that count, or sums of them.",
    "merge": "Put the parts of one run that lie in several logs (other ranks, steps or queries) into one.",
    "checkpoints": "Measure training samples at checkpoints of a training that is over.",
    "outliers": "Rank the samples that are broken, mislabelled or foreign, or that drive the model alone.",
    "query": "Compute the gradients of images at a run's snapshots, to ask for their influences.",
    "influence": "List the training samples that most influenced each query.",
    "bias": "Show how gradient norms depend on the timestep, and what that does to the rankings.",
    "report": "Write one HTML page: what stands out, what made the queries' images, and what the run did.",
    "alerts": "List the alerts raised while the model trained, or follow them while it trains.",
    "watch": "Show a live table of the samples while a run trains: visits, losses, norms, alerts.",
    "evaluate": "Judge scores: against known sources, known outliers, and retrained models.",
}


def parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """All commands by name and summary, and the options of the one that is ``wanted``."""
    root = argparse.ArgumentParser(
        prog="diffhook", description="See which training images drive a diffusion model."
    )
    root.add_argument("--version", action="version", version=f"diffhook {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == wanted:
            _add_options(command, name)
    return root


def _add_options(command: argparse.ArgumentParser, name: str) -> None:
    module = import_module(f"diffhook.cli.{name}")
    command.epilog = (module.__doc__ or "").partition("\n\n")[2]
    if name != "run":  # what follows its script's name is the script's
        nargs = "?" if name == "influence" else None  # the list of its methods is of no log
        command.add_argument("log", metavar="LOG", nargs=nargs, help="the run's log: a folder or URL")
        command.add_argument("--json", action="store_true", help="print JSON for machines")
    module.arguments(command)
    command.set_defaults(run=module.run)


def _command(arguments: Sequence[str]) -> str | None:
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _complete() -> None:
    """Where the shell asks for completions (argcomplete's protocol), answer and exit."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser(_command(os.environ["COMP_LINE"].split()[1:])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _complete()
    parsed = parser(_command(arguments)).parse_args(arguments)
    try:
        status: int = parsed.run(parsed) or 0
    except DiffHookError as error:
        print(f"diffhook: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough
        return 0
    except KeyboardInterrupt:
        if parsed.command == "run":  # the script's own affair
            raise
        print("diffhook: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # a path of the user's that cannot be written or read
        print(f"diffhook: {one_line(str(error))}", file=sys.stderr)
        return 2
    return status
