"""How far a dask.distributed cluster has come with a task. Needs the extra "cluster"."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distributed.diagnostics.progressbar import ProgressBar

Draw = Callable[[int, int], None]  # tasks done, tasks in all


class _Listener(ProgressBar):
    def __init__(self, future: Any, draw: Draw) -> None:
        super().__init__([future], future.client.scheduler.address)
        self._draw = draw

    def _draw_bar(self, *, remaining: int, all: int, **_: Any) -> None:
        self._draw(all - remaining, all)

    async def listen_quietly(self) -> None:
        with suppress(OSError):  # a lost connection: whoever waits for the result hears of it
            await self.listen()


def follow(future: Any, draw: Draw) -> None:
    """Have ``draw`` called, by the client's own loop, until the future is there. Does not wait."""
    future.client.loop.add_callback(_Listener(future, draw).listen_quietly)
