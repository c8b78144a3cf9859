"""Ctrl-C as the usual end of a command that goes on until it is told to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which breaks off no read of the log; a second time, it does."""
    pressed: list[bool] = []
    usual = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def once(*_: object) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, once)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, usual)
