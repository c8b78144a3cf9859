"""How far a value lies from what is usual at its timestep, and at this stage of training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diffhook.log import Rows

Values = npt.NDArray[np.float64]

_LEAST, _MOST = 512, 4096  # rows remembered: the later half of those seen, within these bounds
_BIN = 64  # of them that are a row's bin; half the memory while that is smaller
_FIRST = 64  # rows seen before the first is judged
_COMMON = 64  # the last deviations whose median moves all timesteps alike
_QUANTILES = np.array([0.5, 0.7, 0.8, 0.9])
_NORMAL = np.array([0.5244, 0.8416, 1.2816])  # where a standard normal has the last three


class Deviation:
    """Compares logarithms of a column with those of rows at similar timesteps.

    A row's bin is the 64 of the last 512 to 4096 rows that are nearest in timestep: so bins fit any
    scheduler, 0–1000 or 0–1, uniform or not, and are narrow where timesteps are dense. Its deviation
    is (log value − median) / spread, less the median deviation of the last rows at whatever timestep,
    which is training's own progress. The spread is that of the bin's upper half: only large values
    alarm, and norms are skewed.

    Detectors share one for each column, see :class:`Deviations`: the same rows are judged once.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self.level = 0.0  # by how much all timesteps alike have moved since the beginning, in logs
        self._timesteps: Values = np.empty(0)
        self._logs: Values = np.empty(0)
        self._recent: Values = np.empty(0)
        self._seen = 0
        self._judged: Rows | None = None
        self._found = np.empty((2, 0))

    def __call__(self, rows: Rows) -> tuple[Values, Values]:
        """Judge the rows, then remember them.

        Returns:
            (rows,) deviations, in about standard deviations of a normal's upper half, and (rows,)
            multiples of what is usual. NaN where a value is not positive and finite, has no
            timestep, or too little was seen yet.
        """
        if rows is not self._judged:
            self._judged, self._found = rows, self._judge(rows)
        return self._found[0], self._found[1]

    def _judge(self, rows: Rows) -> Values:
        values, timesteps = rows[self.column].astype(float), rows["timestep"].astype(float)
        usable = np.isfinite(values) & (values > 0) & np.isfinite(timesteps)
        found = np.full((2, len(values)), np.nan)
        logs, timesteps = np.log(values[usable]), timesteps[usable]
        if len(logs) and len(self._logs) >= _FIRST:
            found[:, usable] = self._compare(logs, timesteps)
        self._seen += len(logs)
        memory = min(max(self._seen // 2, _LEAST), _MOST)
        self._logs = np.concatenate([self._logs, logs])[-memory:]
        self._timesteps = np.concatenate([self._timesteps, timesteps])[-memory:]
        return found

    def _compare(self, logs: Values, timesteps: Values) -> tuple[Values, Values]:
        order = np.argsort(self._timesteps, kind="stable")
        size = min(_BIN, len(order) // 2)
        sides = [np.searchsorted(self._timesteps[order], timesteps, side) for side in ("left", "right")]
        middle = np.sum(sides, axis=0) // 2  # where timesteps repeat, as with a few of them
        first = np.clip(middle - size // 2, 0, len(order) - size)
        bins = self._logs[order][first[:, None] + np.arange(size)]  # (rows, size)
        bins.sort(axis=1)
        quantiles = bins[:, np.rint(_QUANTILES * (size - 1)).astype(int)].T  # (4, rows)
        spread = np.maximum(((quantiles[1:] - quantiles[0]).T / _NORMAL).mean(1), 1e-6)
        excess = logs - quantiles[0]
        recent = np.concatenate([self._recent, excess])[-max(_COMMON, len(excess)) :]
        shift = float(np.median(recent))
        self.level += shift
        self._logs += shift  # the memory moves with the training
        self._recent = recent - shift
        excess -= shift
        return excess / spread, np.exp(excess)


class Deviations(dict[str, Deviation]):
    """Column → its deviation, made when first asked for."""

    def __missing__(self, column: str) -> Deviation:
        return self.setdefault(column, Deviation(column))
