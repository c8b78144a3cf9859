"""Rows on their way into the log: are their samples the log's, and what units have their timesteps?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from diffhook.appearance import COLUMNS
from diffhook.capture.recording.timestep_units import TimestepUnits
from diffhook.capture.samples.appearance import appearance as figures_of
from diffhook.capture.samples.familiarity import Familiarity
from diffhook.errors import LogError
from diffhook.log import Rows

_MOST = 4096  # rows that wait for the units of their timesteps


class IncomingRows:
    """Passes rows on, and keeps those back that come before enough is known of them.

    Args:
        familiarity: what the log knows of its samples; None: it is new, and rows pass.
        units: of timesteps.
        put: called with (rows, the layer that was first not finite).
    """

    def __init__(
        self,
        familiarity: Familiarity | None,
        units: TimestepUnits,
        put: Callable[[Rows, str | None], None],
    ) -> None:
        self._familiarity = familiarity
        self._units = units
        self._put = put
        self._kept: list[tuple[Rows, str | None]] = []

    def __len__(self) -> int:
        """Rows that are kept back."""
        return sum(len(rows["sample"]) for rows, _ in self._kept)

    def recognise(
        self, sample_ids: Tensor, clean: Tensor | None, names: Mapping[int, str] | None = None
    ) -> None:
        """Compare samples with what the log says of them, before any row of theirs is written.

        Args:
            sample_ids: (B,) int64.
            clean: (B, …, H, W) their images or latents, where known.
            names: id → name; None: what they are called tells nothing, as where there are several datasets.

        Raises:
            LogError: the log is of another dataset.
        """
        if self._familiarity is None:
            return
        ids = sample_ids.cpu().numpy()
        if names is not None:
            self._familiarity.meet(ids, names)
        if clean is not None and len(clean) == len(ids):
            self._familiarity.see(ids, figures_of(clean).cpu().numpy())

    def add(self, rows: Rows, layer: str | None, names: Mapping[int, str] | None) -> None:
        """Complete rows.

        Raises:
            LogError: the log is of another dataset. What was kept back is dropped.
        """
        self._kept.append((rows, layer))
        if self._familiarity is not None:
            try:
                if names is not None:
                    self._familiarity.meet(rows["sample"], names)
                self._familiarity.see(rows["sample"], np.stack([rows[name] for name in COLUMNS], 1))
            except LogError:
                self._kept.clear()
                raise
            if self._familiarity.undecided:
                return
        if not self._units.waiting or len(self) > _MOST:
            self.release()

    def settle(self) -> None:
        """Pass on what can be: a checkpoint is about to be written."""
        if not self._units.waiting:
            self.release()

    def release(self) -> None:
        """Pass on what is kept back: nothing more will be known of it. Units that are not known by now are
        the model's, for all rows to come, too."""
        kept, self._kept = self._kept, []
        if kept:
            self._units.learn(1.0)
        for rows, layer in kept:
            self._put(self._units.apply(rows), layer)
