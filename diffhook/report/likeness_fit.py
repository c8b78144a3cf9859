"""How far pictures' statistics are from those that a log has of its samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_SHUFFLES = 16
_ROUNDS = 3
_CLOSE, _ALIKE = 0.005, 0.1  # nearer than all but so many of strangers' pairs: as they are; cropped at random
_MOST, _NEARLY = 0.5, 0.9  # of the pictures; of those within every tolerance
_SAME = 1e-3  # spreads of the samples: no difference counts for less
_BEYOND = 5.0  # times the usual difference of pictures that fit
_SURELY, _MARGINS = 10.0, (1.0, 1.5, 2.5)  # the same of the surest statistic; times what nearly all differ by
_SIGMAS = 3.4  # standard deviations in as much, of a normal's
_FLAT = np.array([-np.inf, *np.log([1e-2, 1e-2])])  # no less contrast or roughness counts: it is rounding

_PLACES = 8  # that a missing or extra file moves others by, at most
_UNLIKELY = 12.0  # a log likelihood ratio: so well another place fits by chance once in a hundred thousand


@dataclass(frozen=True)
class Scale:
    """From pictures' statistics to the log's, (rows, 3) of :func:`diffhook.appearance.on_scale` both.

    Attributes:
        factor: of means; contrast and roughness are logarithms.
        shift: (3,)
        spread: (3,) of the samples.
        tolerance: (3,) by how many spreads a picture's statistic may differ.
    """

    factor: float
    shift: Values
    spread: Values
    tolerance: Values

    @classmethod
    def fit(cls, pictures: Values, logged: Values) -> Scale:
        """By the half of the pictures that fit best. An average over neighbours keeps the mean and makes
        contrast and roughness less, by how much depends on the picture: each has a tolerance of its own."""
        spread, own = _spread(logged), _spread(pictures)
        factor = float(spread[0] / own[0])
        scaled = pictures * np.array([factor, 1.0, 1.0])
        scale = cls(factor, np.median(logged, 0) - np.median(scaled, 0), spread, np.ones(3))
        for _ in range(_ROUNDS):
            best = np.argsort(scale.ratio(pictures, logged), kind="stable")[: (len(logged) + 1) // 2]
            factor = _slope(pictures[best, 0], logged[best, 0], scale.factor)
            scaled = pictures[best] * np.array([factor, 1.0, 1.0])
            scale = cls(factor, np.median(logged[best] - scaled, 0), spread, np.ones(3))
            usual = np.median(scale.off(pictures, logged), 0)
            scale = cls(factor, scale.shift, spread, np.maximum(_BEYOND * usual, _SAME))
        return scale

    def by_the_surest(self, pictures: Values, logged: Values, margin: float) -> Scale:
        """The same, by the statistic that differs least: how far the others may, those pictures say that fit
        by it. By how much a loop changes them may vary widely from picture to picture."""
        off = self.off(pictures, logged)
        usual = np.median(off, 0)
        surest = int(usual.argmin())
        own = max(_SURELY * usual[surest], _SAME)
        fits = off[off[:, surest] <= own]
        tolerance = np.maximum(_BEYOND * np.median(fits, 0), margin * np.quantile(fits, 0.95, axis=0))
        tolerance[surest] = own
        return replace(self, tolerance=np.maximum(tolerance, _SAME))

    def off(self, pictures: Values, logged: Values) -> Values:
        """(rows, 3) in the samples' spreads."""
        scaled = pictures * np.array([self.factor, 1.0, 1.0]) + self.shift
        off: Values = np.abs(np.maximum(scaled, _FLAT) - np.maximum(logged, _FLAT)) / self.spread
        return off

    def ratio(self, pictures: Values, logged: Values) -> Values:
        """(rows,) the largest difference over its tolerance; 0 where none counts."""
        off = self.off(pictures, logged)
        found: Values = np.where((off <= _SAME).all(1), 0.0, (off / self.tolerance).max(1))
        return found


@dataclass(frozen=True)
class Fit:
    """How pictures, each beside its sample, fit.

    Attributes:
        ratio: (rows,) of :meth:`Scale.ratio`.
        limit: the ratio up to which a picture is its sample's.
        exact: whether hardly any picture of another sample is within the limit.
        strangers: the share of other samples' pictures that would be within every tolerance.
    """

    scale: Scale
    ratio: Values
    limit: float
    exact: bool
    strangers: float

    @classmethod
    def of(cls, pictures: Values, logged: Values) -> Fit:
        scale = Scale.fit(pictures, logged)
        scales = [scale, *(scale.by_the_surest(pictures, logged, margin) for margin in _MARGINS)]
        fits = [cls._within(each, pictures, logged) for each in scales]
        return max(fits, key=lambda fit: (fit.exact, fit.share)) if any(f.exact for f in fits) else fits[0]

    @classmethod
    def _within(cls, scale: Scale, pictures: Values, logged: Values) -> Fit:
        ratio, others = scale.ratio(pictures, logged), _strangers(scale, pictures, logged)
        within = float((others <= 1).mean()) if len(others) else 0.0
        limit = _least(others, _CLOSE)
        share = float((ratio <= limit).mean())
        exact = share >= max(_MOST, _NEARLY * float((ratio <= 1).mean()))
        if not exact:  # cropped or coloured at random
            limit = _least(others, _ALIKE)
        return cls(scale, ratio, limit, exact, within)

    @property
    def share(self) -> float:
        """Of the pictures, those that fit."""
        return float((self.ratio <= self.limit).mean())


@dataclass(frozen=True)
class Displaced:
    """Samples in a row whose pictures lie some places away from where they are looked for.

    Attributes:
        first, last: the first and the last of the samples.
        places: by how many ids the pictures come later (or earlier, if negative).
        count: of the pictures compared.
    """

    first: int
    last: int
    places: int
    count: int


def displacement(
    ids: npt.NDArray[np.int64], pictures: Values, logged: Values, scale: Scale
) -> Displaced | None:
    """The samples in a row that pictures some places away fit far better than their own; None of none.

    Args:
        ids: (rows,) ascending; the pictures' own, too.
    """
    own, found, best = _unlikeliness(scale, pictures, logged), None, _UNLIKELY
    for places in (p for p in range(-_PLACES, _PLACES + 1) if p):
        at = np.searchsorted(ids, ids + places)
        there = np.flatnonzero((at < len(ids)) & (ids[np.minimum(at, len(ids) - 1)] == ids + places))
        gain = own[there] - _unlikeliness(scale, pictures[at[there]], logged[there])
        first, last, total = _best_run(gain)
        if total > best:
            run = ids[there[[first, last]]].tolist()
            best, found = total, Displaced(run[0], run[1], places, last - first + 1)
    return found


def _unlikeliness(scale: Scale, pictures: Values, logged: Values) -> Values:
    """(rows,) how much less likely than a perfect fit, as a logarithm; at most so much: any picture may be
    another."""
    sigmas: Values = np.minimum(_SIGMAS * scale.ratio(pictures, logged), _SIGMAS)
    return sigmas**2 / 2


def _best_run(gain: Values) -> tuple[int, int, float]:
    """First and last position of the run of the highest sum, and that sum."""
    if not len(gain):
        return 0, 0, 0.0
    sums = np.concatenate([[0.0], np.cumsum(gain)])
    lowest = np.minimum.accumulate(sums[:-1])
    last = int(np.argmax(sums[1:] - lowest))
    first = int(np.argmin(sums[: last + 1]))
    return first, last, float(sums[last + 1] - sums[first])


def _spread(values: Values) -> Values:
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    spread: Values = np.maximum((high - low) / 2.56, 1e-6)
    return spread


def _slope(pictures: Values, logged: Values, otherwise: float) -> float:
    """Theil and Sen's: the median of all pairs' slopes; otherwise, where the pictures' means are all one."""
    i, j = np.triu_indices(len(pictures), 1)
    run = pictures[j] - pictures[i]
    apart = np.abs(run) > 1e-6
    slope = float(np.median((logged[j] - logged[i])[apart] / run[apart])) if apart.any() else otherwise
    return slope if slope > 0 else otherwise


def _strangers(scale: Scale, pictures: Values, logged: Values) -> Values:
    """The ratios of pictures and samples that have nothing to do with each other; copies are no strangers."""
    places = np.random.default_rng(0).permutation(np.arange(1, len(pictures)))[:_SHUFFLES]
    found = []
    for other in (np.roll(pictures, place, axis=0) for place in places):
        apart = np.abs(other - pictures).max(1) > 0
        found.append(scale.ratio(other[apart], logged[apart]))
    return np.concatenate(found)


def _least(ratios: Values, share: float) -> float:
    """The ratio that so many of these are within; at most every tolerance."""
    return min(float(np.quantile(ratios, share)), 1.0) if len(ratios) else 1.0
