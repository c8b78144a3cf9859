"""What a person sees in a terminal while work goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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


@contextmanager
def scan_progress(bar: Progress, description: str) -> Iterator[None]:
    """A line in the bar for each dask graph that this process computes inside the block.

    Graphs handed to a dask.distributed client are computed elsewhere and not shown.
    """
    from dask.callbacks import Callback

    tasks = []

    def begin(graph: Any, state: Any) -> None:
        tasks.append(bar.add_task(description, total=len(state["ready"]) + len(state["waiting"])))

    def advance(*_: Any) -> None:
        bar.advance(tasks[-1])

    def finish(*_: Any) -> None:
        bar.remove_task(tasks.pop())

    with Callback(start_state=begin, posttask=advance, finish=finish):
        yield
