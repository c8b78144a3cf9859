"""Whether a run's samples look as those of the same ids did in the log that it writes into.

Two datasets of equal length and kind are told apart by nothing but what their samples look like.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.stats

from diffhook.errors import LogError
from diffhook.log import RunLog
from diffhook.looks import COLUMNS, FIGURES, Values, on_scale

_ROWS = 1 << 16  # of the log that are looked at, the last ones
_ENOUGH = 64  # samples, after which nothing more is compared
_TOLERANCE = 0.1  # of what two samples usually differ by
_CHANCE = 1e-3  # that the same dataset would be recognised so seldom
_FEW = 0.25  # a dataset of which more is recognised is at most a changed one

Ids = npt.NDArray[np.integer]


class Familiarity:
    """Compares samples with what a log says of the same ids, one after another.

    A sample is recognised by its mean, or by its contrast and roughness: resizing leaves the first as it is,
    brightening the others. How often the same sample is recognised, which random crops prevent, is learned
    from the log's own repeated visits; where there are none, nothing is concluded.

    Args:
        ids: (rows,) sample ids of the log, in the order of their visits.
        looks: (rows, 3) :data:`~diffhook.looks.FIGURES` of each.
        location: the log's, for the message.
    """

    def __init__(self, ids: Ids, looks: npt.NDArray[np.floating], location: str) -> None:
        known = np.isfinite(looks).all(1)
        looks, order = on_scale(looks[known]), np.argsort(ids[known], kind="stable")
        again = np.flatnonzero(np.diff(ids[known][order]) == 0)
        self._location = location
        self._looks = dict(zip(ids[known].tolist(), looks, strict=True))  # the last visit's
        self._seen: dict[int, bool] = {}  # sample → whether it was recognised
        self._tolerance = np.zeros(len(FIGURES))
        if len(looks):
            low, high = np.quantile(looks, [0.25, 0.75], axis=0)
            self._tolerance = _TOLERANCE * (high - low) + 1e-4
        hits = self._alike(looks[order][again], looks[order][again + 1]).sum()
        self._usual = float(hits / (len(again) + 1))  # how often a sample is recognised

    @classmethod
    def of(cls, log: RunLog) -> Familiarity:
        """
        Raises:
            LogError: the log is damaged.
        """
        ids: list[Ids] = [np.empty(0, np.int64)]
        looks: list[npt.NDArray[np.floating]] = [np.empty((0, len(FIGURES)))]
        for block in reversed(list(log.train.blocks())):
            ids.insert(1, log.train.read(block, "sample"))
            looks.insert(1, np.stack([log.train.read(block, name) for name in COLUMNS], 1))
            if sum(map(len, ids)) >= _ROWS:
                break
        return cls(np.concatenate(ids), np.concatenate(looks), log.location)

    def see(self, ids: Ids, looks: npt.NDArray[np.floating]) -> None:
        """Compare the samples of a batch.

        Args:
            ids: (rows,).
            looks: (rows, 3) figures, NaN where they are not known.

        Raises:
            LogError: they are another dataset's.
        """
        if len(self._seen) >= _ENOUGH or not self._looks:
            return
        for sample, figures in zip(ids.tolist(), on_scale(looks), strict=True):
            if sample in self._looks and sample not in self._seen and np.isfinite(figures).all():
                self._seen[sample] = bool(self._alike(figures, self._looks[sample]))
        recognised = sum(self._seen.values())
        if recognised <= _FEW * len(self._seen) and self._chance(recognised) < _CHANCE:
            few = recognised or "none"
            raise LogError(
                f"the log at {self._location} belongs to another dataset, or to one that was prepared "
                f"otherwise: of {len(self._seen)} samples with ids that it knows, {few} look as they did "
                "(mean, contrast, roughness). Choose another path, or train on the log's samples to continue "
                "it"
            )

    def _alike(self, one: Values, other: Values) -> npt.NDArray[np.bool_]:
        near = np.abs(one - other) <= self._tolerance
        found: npt.NDArray[np.bool_] = near[..., 0] | (near[..., 1] & near[..., 2])
        return found

    def _chance(self, recognised: int) -> float:
        return float(scipy.stats.binom.cdf(recognised, len(self._seen), self._usual))
