"""The standard library's."""

from __future__ import annotations

import threading
from collections.abc import Callable


def before_threads_end(call: Callable[[], None]) -> None:
    """Call it when the interpreter ends, while thread pools still work. By the time of ``atexit`` those that
    zarr writes through are gone."""
    threading._register_atexit(call)  # type: ignore[attr-defined]
