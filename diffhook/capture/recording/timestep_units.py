"""A timestep has the scheduler's units in the log, and in the model's call perhaps others."""

from __future__ import annotations

import numpy as np

from diffhook.log import Rows


class TimestepUnits:
    """What the model's timesteps are in the scheduler's units: told by the loss, once that is known.

    Flow matching often tells its model 0 … 1 where the scheduler counts to 1,000. Until that is known, rows
    wait.

    Args:
        scale: factor on the timestep that the model is told; None: not known yet.
    """

    def __init__(self, scale: float | None) -> None:
        self._scale = scale
        self._told = False  # timesteps come from the model's calls, …
        self._whole = True  # … and are whole numbers, which nobody scales

    def note(self, *, whole: bool) -> None:
        """Rows are to come whose timesteps are those of the model's call."""
        self._told, self._whole = True, whole

    def learn(self, scale: float) -> None:
        """The loss is known now, or known to be unknown; what is known already stands."""
        self._scale = scale if self._scale is None else self._scale

    @property
    def waiting(self) -> bool:
        """Whether rows cannot be written, since their units are not known."""
        return self._told and not self._whole and self._scale is None

    def apply(self, rows: Rows) -> Rows:
        """The rows with their timesteps in the scheduler's units."""
        if not self._told or self._scale in (None, 1.0):
            return rows
        return {**rows, "timestep": rows["timestep"] / np.float32(self._scale)}
