"""How unlike the others a clean sample looks, by three statistics of its pixels (or latents)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STATISTICS = ("mean", "contrast", "roughness")
"""Of a sample: its mean, its standard deviation, and the root mean square of the differences between
neighbours along its last two axes."""

COLUMNS = tuple(f"input_{statistic}" for statistic in STATISTICS)
"""Where a log has them."""

Values = npt.NDArray[np.float64]

_EXTREMES = (("dark", "bright"), ("flat", "stark"), ("smooth", "rough"))
"""What a sample is whose statistic is low, and high."""

_NONE = np.log(1e-6) + 1e-3  # what the scale has of no contrast and of no roughness at all
_ABSURD = 10.0  # deviations from which on their number tells no more

_ALIKE = 0.1  # of what half of the samples differ by
FEW = 0.25
"""A dataset of whose samples more look as they did is at most a changed one."""

_CLIP = 3.0  # deviations beyond it tell nothing of how statistics go together
_NORMAL = 1.2816  # where a standard normal has its outer tenths


def on_scale(statistics: npt.NDArray[np.floating]) -> Values:
    """(rows, 3) the mean as it is, and the logarithms of the two that are positive."""
    statistics = statistics.astype(np.float64)
    return np.concatenate([statistics[:, :1], np.log(np.maximum(statistics[:, 1:], 1e-6))], 1)


def usual_differences(statistics: Values) -> Values:
    """(3,) what half of the samples differ by, of (rows, 3) of :func:`on_scale`."""
    low, high = np.quantile(statistics, [0.25, 0.75], axis=0)
    return np.asarray(high - low)


def look_alike(one: Values, other: Values, usual: Values) -> npt.NDArray[np.bool_]:
    """(rows,) whether samples have the same mean, or the same contrast and roughness: resizing leaves the
    first as it is, brightening the others, crops and flips leave all near what they were.

    Args:
        one, other: (rows, 3) of :func:`on_scale`; or (3,), whose answer is one.
        usual: (3,) of :func:`usual_differences`.
    """
    near = np.abs(one - other) <= _ALIKE * usual + 1e-4
    alike: npt.NDArray[np.bool_] = near[..., 0] | (near[..., 1] & near[..., 2])
    return alike


def _uniform(statistics: Values) -> str:
    """What a sample wholly lacks, or nothing."""
    _, contrast, roughness = statistics.tolist()
    if contrast <= _NONE:
        return "a single colour only"
    return "no texture at all" if roughness <= _NONE else ""


class ReferenceStatistics:
    """What statistics are usual, learned from some samples of which a few may be broken.

    A sample's statistics are set against the median, scaled by the spread on the same side of it, and
    together as Mahalanobis's distance under the correlation of deviations clipped at 3, which broken samples
    cannot bend.

    Args:
        seen: (rows, 3) of :func:`on_scale`, all finite.
    """

    def __init__(self, seen: Values) -> None:
        low, self._middle, high = np.quantile(seen, [0.1, 0.5, 0.9], axis=0)
        self._spreads = np.maximum(np.stack([self._middle - low, high - self._middle]) / _NORMAL, 1e-6)
        self._range = np.quantile(seen, [0.01, 0.99], axis=0)
        clipped = np.clip(self._deviations(seen), -_CLIP, _CLIP)
        self._together = clipped.T @ clipped / len(clipped) + 1e-3 * np.eye(len(STATISTICS))

    def distances(self, statistics: Values) -> Values:
        """(rows,) of (rows, 3) of :func:`on_scale`; NaN where a statistic is."""
        found = self._deviations(statistics)
        with np.errstate(invalid="ignore"):  # of infinite ones, which have no distance
            return np.sqrt((found * np.linalg.solve(self._together, found.T).T).sum(1))

    def words(self, statistics: Values) -> str:
        """What is unlike the others about one sample, (3,) of :func:`on_scale`."""
        if uniform := _uniform(statistics):
            return f"it has {uniform}"
        statistic = int(np.abs(self._deviations(statistics[None])).argmax())
        value, (low, high) = statistics[statistic], self._range[:, statistic]
        if low <= value <= high:
            return f"its {', '.join(STATISTICS[:-1])} and {STATISTICS[-1]} do not go together as theirs do"
        value, low, high = (value, low, high) if statistic == 0 else np.exp([value, low, high])
        return f"its {STATISTICS[statistic]} is {value:.3g}, that of 98% of them {low:.3g} to {high:.3g}"

    def brief(self, statistics: Values) -> str:
        """The same in two words or three."""
        if uniform := _uniform(statistics):
            return uniform
        deviations = self._deviations(statistics[None])[0]
        statistic = int(np.abs(deviations).argmax())
        low, high = self._range[:, statistic]
        if low <= statistics[statistic] <= high:
            return "odd in contrast and texture"
        word, far = _EXTREMES[statistic][int(deviations[statistic] > 0)], abs(deviations[statistic])
        return f"extremely {word}" if far > _ABSURD else f"{word} {far:.1f}σ"

    def _deviations(self, statistics: Values) -> Values:
        off = statistics - self._middle
        return off / np.where(off < 0, *self._spreads)
