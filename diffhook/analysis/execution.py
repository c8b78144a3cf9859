"""Where a pass over the log runs, how much memory it may take, and whether it shows its progress."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask
from dask.callbacks import Callback
from rich.progress import Progress, TaskID

from diffhook.console import progress_bar

MEMORY = 2 << 30  # bytes


@dataclass(frozen=True)
class Execution:
    """How dask runs a graph, as in ``influence(log, "queries", execution=Execution(progress=True))``.

    Attributes:
        client: a dask.distributed Client; its workers must see the log's location.
        scheduler: one of dask's own otherwise; threads by default.
        memory: bytes that one process may hold at once; larger sums go through files in dask's
            ``temporary-directory``, which a cluster's workers must share.
        progress: show a bar, on a terminal.
    """

    client: Any = None
    scheduler: Any = None
    memory: int = MEMORY
    progress: bool = False

    @property
    def workers(self) -> int:
        """Blocks in one process's memory at the same time."""
        if self.client is not None:
            return max((w["nthreads"] for w in self.client.scheduler_info()["workers"].values()), default=1)
        return 1 if self.scheduler in ("sync", "synchronous", "single-threaded") else os.cpu_count() or 1

    @contextmanager
    def scratch(self) -> Iterator[str]:
        """A folder for temporary files, gone afterwards."""
        place = dask.config.get("temporary-directory", None)
        with tempfile.TemporaryDirectory(prefix="diffhook-", dir=place) as folder:
            yield folder

    def compute(self, task: Any, title: str = "") -> Any:
        """The value of a delayed object."""
        with progress_bar(self.progress) as bar:
            shown = bar.add_task(title, total=None)
            if self.client is not None:
                future = self.client.compute(task)
                if not bar.disable:
                    from diffhook.analysis.cluster import follow

                    follow(future, lambda done, total: bar.update(shown, completed=done, total=total))
                return future.result()
            with _following(bar, shown):
                (found,) = dask.compute(task, scheduler=self.scheduler or "threads")
        return found


HERE = Execution()
"""In threads of this process."""


@contextmanager
def _following(bar: Progress, shown: TaskID) -> Iterator[None]:
    """The bar follows dask's own scheduler."""
    with Callback(
        start_state=lambda _, state: bar.update(
            shown, total=len(state["waiting"]) + len(state["ready"]) + len(state["running"])
        ),
        posttask=lambda *_: bar.advance(shown),
    ):
        yield
