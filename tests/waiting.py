"""Other threads and processes, waited for by what they do: a busy machine takes its time."""

from __future__ import annotations

import time
from collections.abc import Callable

_PATIENCE = 60.0  # seconds


def wait_until(condition: Callable[[], bool]) -> None:
    """Until it holds.

    Raises:
        TimeoutError: it does not within a minute.
    """
    until = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited for {_PATIENCE:g} s in vain")
        time.sleep(0.01)
