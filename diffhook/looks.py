"""How unlike the others a clean sample looks, by three figures of its pixels (or latents)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FIGURES = ("mean", "contrast", "roughness")
"""Of a sample: its mean, its standard deviation, and the root mean square of the differences between
neighbours along its last two axes."""

COLUMNS = tuple(f"input_{figure}" for figure in FIGURES)
"""Where a log has them."""

Values = npt.NDArray[np.float64]

_EXTREMES = (("dark", "bright"), ("flat", "stark"), ("smooth", "rough"))
"""What a sample is whose figure is low, and high."""

_NONE = np.log(1e-6) + 1e-3  # what the scale has of no contrast and of no roughness at all
_ABSURD = 10.0  # deviations from which on their number tells no more

_CLIP = 3.0  # deviations beyond it tell nothing of how figures go together
_NORMAL = 1.2816  # where a standard normal has its outer tenths


def on_scale(figures: npt.NDArray[np.floating]) -> Values:
    """(rows, 3) the mean as it is, and the logarithms of the two that are positive."""
    figures = figures.astype(np.float64)
    return np.concatenate([figures[:, :1], np.log(np.maximum(figures[:, 1:], 1e-6))], 1)


def _uniform(figures: Values) -> str:
    """What a sample wholly lacks, or nothing."""
    _, contrast, roughness = figures.tolist()
    if contrast <= _NONE:
        return "a single colour only"
    return "no texture at all" if roughness <= _NONE else ""


class Usual:
    """What figures are usual, learned from some samples of which a few may be broken.

    A sample's figures are set against the median, in spreads of that side of it, and together as
    Mahalanobis's distance under the correlation of deviations clipped at 3, which broken samples cannot bend.

    Args:
        seen: (rows, 3) of :func:`on_scale`, all finite.
    """

    def __init__(self, seen: Values) -> None:
        low, self._middle, high = np.quantile(seen, [0.1, 0.5, 0.9], axis=0)
        self._spreads = np.maximum(np.stack([self._middle - low, high - self._middle]) / _NORMAL, 1e-6)
        self._range = np.quantile(seen, [0.01, 0.99], axis=0)
        clipped = np.clip(self._deviations(seen), -_CLIP, _CLIP)
        self._together = clipped.T @ clipped / len(clipped) + 1e-3 * np.eye(len(FIGURES))

    def distances(self, figures: Values) -> Values:
        """(rows,) of (rows, 3) of :func:`on_scale`; NaN where a figure is."""
        found = self._deviations(figures)
        with np.errstate(invalid="ignore"):  # of infinite ones, which have no distance
            return np.sqrt((found * np.linalg.solve(self._together, found.T).T).sum(1))

    def words(self, figures: Values) -> str:
        """What is unlike the others about one sample, (3,) of :func:`on_scale`."""
        if uniform := _uniform(figures):
            return f"it has {uniform}"
        figure = int(np.abs(self._deviations(figures[None])).argmax())
        value, (low, high) = figures[figure], self._range[:, figure]
        if low <= value <= high:
            return f"its {', '.join(FIGURES[:-1])} and {FIGURES[-1]} do not go together as theirs do"
        value, low, high = (value, low, high) if figure == 0 else np.exp([value, low, high])
        return f"its {FIGURES[figure]} is {value:.3g}, that of 98% of them {low:.3g} to {high:.3g}"

    def brief(self, figures: Values) -> str:
        """The same in two words or three."""
        if uniform := _uniform(figures):
            return uniform
        deviations = self._deviations(figures[None])[0]
        figure = int(np.abs(deviations).argmax())
        low, high = self._range[:, figure]
        if low <= figures[figure] <= high:
            return "odd in contrast and texture"
        word, far = _EXTREMES[figure][int(deviations[figure] > 0)], abs(deviations[figure])
        return f"extremely {word}" if far > _ABSURD else f"{word} {far:.1f}σ"

    def _deviations(self, figures: Values) -> Values:
        off = figures - self._middle
        return off / np.where(off < 0, *self._spreads)
