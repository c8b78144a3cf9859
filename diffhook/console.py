"""What a person sees in a terminal while work goes on."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("diffhook")


def progress_bar(enabled: bool = True) -> Progress:
    """A progress bar with the remaining time, on standard error; silent when that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled or not sys.stderr.isatty(),
        transient=True,
    )


def announce(text: str) -> None:
    """Print for the person at the terminal; to the log where standard output is closed, full or gone."""
    try:
        print(text, flush=True)
    except (OSError, ValueError, AttributeError):
        logger.info("%s", text)
