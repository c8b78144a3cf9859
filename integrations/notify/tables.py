"""The table of ``diffhook watch`` in the experiment trackers that an Accelerator writes to."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from diffhook.capture.checks import check_whole
from diffhook.log import open_log

logger = logging.getLogger("diffhook")

_NAME = "diffhook/samples"
_COLUMNS = ["name", "role", "visits", "last_loss", "mean_loss", "norm", "factor", "alerts", "last_alert"]
Cells = Sequence[Sequence[Any]]
_Show = Callable[[Any, Cells, int | None], None]
_SHOW: dict[str, _Show] = {}


class SampleTables:
    """Shows the samples with the highest mean loss in Weights & Biases (table) and TensorBoard (text).

    Losses and norms are relative, see :class:`~diffhook.analysis.sample_table.SampleTable`. A table is read
    off the log in a thread of its own, and goes out after the loop's next ``accelerator.log``, at its step:
    trackers drop steps that go back. Other trackers have no tables.

    Example:
        >>> hook = DiffHook(accelerator, "runs/butterflies")
        >>> tables = SampleTables(hook, every=500)

    Args:
        hook: a DiffHook, which keeps the tables coming until it is closed.
        every: optimiser steps between two tables.
        top: samples in a table.

    Raises:
        ConfigurationError: ``every`` or ``top`` is no whole number of at least 1.
    """

    def __init__(self, hook: Any, *, every: int = 500, top: int = 50) -> None:
        check_whole("every", every, 1)
        check_whole("top", top, 1)
        self._hook, self._accelerator = weakref.proxy(hook), weakref.proxy(hook.accelerator)
        self._path, self._every, self._top = hook.capture.path, every, top
        self._shown = 0  # the step of the last table
        self._reading: threading.Thread | None = None
        self._cells: Cells | None = None
        if not hook.closed and hook.accelerator.is_main_process:
            hook.capture.attachment.replace(hook.accelerator, "log", after=self._logged)
            hook.capture.attachment.on_detach(self._end)

    def _logged(self, result: Any, values: Any, step: int | None = None, *_: Any, **__: Any) -> None:
        cells, self._cells = self._cells, None
        if cells is not None:
            for tracker in self._accelerator.trackers:
                if show := _SHOW.get(tracker.name):
                    show(tracker, cells, step)
        if self._reading is None and self._hook.step_count >= self._shown + self._every:
            self._shown = self._hook.step_count
            self._hook.flush()
            self._reading = threading.Thread(target=self._read, name="diffhook-table", daemon=True)
            self._reading.start()

    def _read(self) -> None:
        # A training without tables need not import it.
        from diffhook.analysis.sample_table import sample_table

        try:
            records = sample_table(open_log(self._path)).sort("loss").records(self._top)
            self._cells = [[record[column] for column in _COLUMNS] for record in records]
        except Exception as error:
            logger.debug("no table of samples at step %d: %r", self._shown, error)
        finally:
            self._reading = None

    def _end(self) -> None:
        if (reading := self._reading) is not None:
            reading.join()


def _shows(name: str) -> Callable[[_Show], _Show]:
    def add(show: _Show) -> _Show:
        _SHOW[name] = show
        return show

    return add


@_shows("tensorboard")
def _tensorboard(tracker: Any, cells: Cells, step: int | None) -> None:
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *cells]
    text = "\n".join("| " + " | ".join(map(_markdown, row)) + " |" for row in rows)
    tracker.tracker.add_text(_NAME, text, global_step=step)
    tracker.tracker.flush()


@_shows("wandb")
def _wandb(tracker: Any, cells: Cells, step: int | None) -> None:
    tracker.log_table(_NAME, columns=_COLUMNS, data=[list(row) for row in cells], step=step)


def _markdown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")
