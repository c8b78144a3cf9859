"""A few numbers for a tracker, in place of thousands of rows."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import torch

_WINDOW = 4096  # norms remembered, should nobody ask


class Scalars:
    """Sums up what was captured since it was last asked."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_WINDOW)  # numbers: kept tensors would break up the heap
        self._alerts = 0  # of the run, already told

    def add(self, norms: np.ndarray) -> None:
        """(B,) norms of a pass."""
        self._norms.extend(norms.tolist())

    def take(self, alerts: Sequence[str]) -> dict[str, float]:
        """Name → number; empty if nothing was captured since.

        Args:
            alerts: kinds of all the run's alerts so far.
        """
        fresh, self._alerts = alerts[self._alerts :], len(alerts)
        if not self._norms:
            return {}
        norms = torch.tensor(list(self._norms))
        self._norms.clear()
        found = {
            "diffhook/grad_norm_median": float(norms.nanmedian()),
            "diffhook/grad_norm_max": float(norms.max()),
            "diffhook/alerts": float(len(fresh)),
        }
        return found | {f"diffhook/alerts_{kind}": float(n) for kind, n in Counter(fresh).items()}
