"""Memory for per-sample products, used again from layer to layer."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

from torch import Tensor

_kept = threading.local()


def scratch(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor; the next call in this thread may give out the same memory.

    On a CPU, megabytes that are freed go back to the system, and to fault in and clear their pages
    again costs as much as filling them. Other devices have allocators that keep them.
    """
    if like.device.type != "cpu":
        return like.new_empty(tuple(shape))
    count = math.prod(shape)
    kept = vars(_kept).get(str(like.dtype))
    if kept is None or kept.numel() < count:
        kept = like.new_empty(count)
        setattr(_kept, str(like.dtype), kept)
    return kept[:count].view(tuple(shape))
