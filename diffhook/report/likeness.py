"""Are these the pictures that the training saw? The log knows each sample's mean, contrast and roughness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.analysis.signals import View
from diffhook.analysis.tables import appearance_table
from diffhook.appearance import COLUMNS, STATISTICS, on_scale
from diffhook.errors import ConfigurationError
from diffhook.images import to_image
from diffhook.log import RunLog
from diffhook.log.samples import ROLE_STRIDE

Images = Callable[[int], Any]
"""sample id → an image that :func:`to_image` takes, or None where there is none."""

Values = npt.NDArray[np.float64]

_ASKED = 512  # samples whose pictures are compared before any is shown
_FEWEST = 16  # of which one can say whether pictures fit
_SEGMENT = 32  # samples in a row among which most must fit: a missing file shifts all that follow
_SHUFFLES = 16
_CLOSE, _CLOSE_SHARE = 0.005, 0.9  # nearer than all but so many of strangers' pairs; share of a segment
_ALIKE, _ALIKE_SHARE = (
    0.1,
    0.75,
)  # the same where the loop resizes, crops or colours them, by mean and contrast
_SAME, _FAR = 1e-3, 0.25  # spreads: a pair no further apart is always close, one further apart never
_FLAT = np.array([-np.inf, *np.log([1e-2, 1e-2])])  # no less contrast or roughness counts: it is rounding
_ROUNDING = 5.0  # times the residual of most pairs that fit


class WrongPictureError(ConfigurationError):
    """A picture is not that of its sample."""


@dataclass(frozen=True)
class Judgement:
    """What was found of a set of pictures.

    Attributes:
        fits: whether they are the training's; None where the log cannot tell.
        share: of the pictures compared, those that fit.
        checked: the pictures; one that does not fit its sample raises a WrongPictureError.
    """

    fits: bool | None
    share: float
    checked: Images


class Likeness:
    """Compares pictures with what the log knows of their samples.

    Both sides' statistics come to one scale by their medians, which no order of the files moves: whatever
    range the loop trains in, and whatever size. Whether a picture fits is decided by how near strangers are:
    the same pictures, shuffled.

    Args:
        ids: (N,) ascending.
        statistics: (N, 3) means over the visits of ``diffhook.appearance.STATISTICS``, as the log has them.
        channels: 1 or 3, of what the model was trained on.
    """

    def __init__(self, ids: npt.NDArray[np.int64], statistics: Values, channels: int) -> None:
        self.mode = "L" if channels == 1 else "RGB"
        known = np.isfinite(statistics).all(1) & (ids < ROLE_STRIDE)
        self.ids, self.statistics = ids[known], on_scale(statistics[known])

    @classmethod
    def of(cls, log: RunLog, execution: Execution | None = None) -> Likeness | None:
        """None where the log knows nothing of its samples' pixels: of latents, or without statistics."""
        model = log.config["identity"].get("model") or {}
        channels = (model.get("config") or {}).get("in_channels")
        table = appearance_table(log)
        if channels not in (1, 3) or table is None:
            return None
        view = View(log, table.name, table, execution or Execution())
        means = [view.means(table, column)[0] for column in COLUMNS]
        found = cls(view.sample_ids, np.column_stack(means).astype(np.float64), channels)
        return found if len(found.ids) >= _FEWEST else None

    def judge(self, images: Images) -> Judgement:
        """Compare some hundred pictures, evenly spaced; then each that is asked for."""
        every = np.unique(np.linspace(0, len(self.ids) - 1, _ASKED).round().astype(np.intp))
        seen = [(i, found) for i in every if (found := self._figures(images, int(self.ids[i]))) is not None]
        if len(seen) < _FEWEST:
            return Judgement(None, 1.0, images)
        logged, pictures = self.statistics[[i for i, _ in seen]], np.stack([found for _, found in seen])
        scale = _Scale.fit(pictures, logged, len(STATISTICS))
        apart, strangers = scale.apart(pictures, logged), _strangers(pictures, logged, scale.used)
        close = float(np.clip(np.quantile(strangers, _CLOSE), _SAME, _FAR))
        if _everywhere(apart <= close, _CLOSE_SHARE):
            usual = float(np.quantile(apart[apart <= close], 0.95))
            limit = min(close, max(_ROUNDING * usual, _SAME))
        else:  # roughness changes with the size
            scale = _Scale.fit(pictures, logged, 2)
            apart, strangers = scale.apart(pictures, logged), _strangers(pictures, logged, scale.used)
            limit = float(np.quantile(strangers, _ALIKE))
        fits = _everywhere(apart <= limit, _ALIKE_SHARE)
        return Judgement(fits, float((apart <= limit).mean()), self._checked(images, scale, limit))

    def _checked(self, images: Images, scale: _Scale, limit: float) -> Images:
        def checked(sample: int) -> Any:
            image = images(sample)
            place = int(np.searchsorted(self.ids, sample))
            if image is None or place == len(self.ids) or self.ids[place] != sample:
                return image
            own = on_scale(figures_of(image, self.mode)[None])
            if scale.apart(own, self.statistics[place][None])[0] > limit:
                raise WrongPictureError(
                    "not what the training saw: its mean, contrast or roughness is another"
                )
            return image

        return checked

    def _figures(self, images: Images, sample: int) -> Values | None:
        """None of a picture that is not there or cannot be read, which is told where it is to be shown."""
        try:
            image = images(sample)
            return None if image is None else on_scale(figures_of(image, self.mode)[None])[0]
        except (OSError, ValueError, LookupError, TypeError):
            return None


def figures_of(image: Any, mode: str) -> Values:
    """(3,) the :data:`diffhook.appearance.STATISTICS` of a picture in grey ("L") or colour ("RGB")."""
    picture = to_image(image).convert(mode)
    values = np.asarray(picture, np.float64).reshape(picture.height, picture.width, -1) / 255
    steps = np.concatenate([np.diff(values, axis=axis).ravel() for axis in (0, 1)])
    rough = float(np.sqrt((steps**2).mean())) if len(steps) else 0.0
    return np.array([values.mean(), values.std(), rough])


@dataclass(frozen=True)
class _Scale:
    """From a picture's statistics to the log's."""

    factor: float  # of means; contrast and roughness are logarithms
    shift: Values
    spread: Values
    used: int  # of the statistics, the first so many are compared

    @classmethod
    def fit(cls, pictures: Values, logged: Values, used: int) -> _Scale:
        low, high = np.quantile(logged, [0.1, 0.9], axis=0)
        spread = np.maximum((high - low) / 2.56, 1e-6)
        factor = float(np.exp(np.median(logged[:, 1]) - np.median(pictures[:, 1])))
        scaled = pictures * np.array([factor, 1.0, 1.0])
        rough = cls(factor, np.median(logged, 0) - np.median(scaled, 0), spread, used)
        best = np.argsort(rough.apart(pictures, logged))[: len(logged) // 2]
        factor = float(np.exp(np.median(logged[best, 1] - pictures[best, 1])))
        scaled = pictures[best] * np.array([factor, 1.0, 1.0])
        return cls(factor, np.median(logged[best] - scaled, 0), spread, used)

    def apart(self, pictures: Values, logged: Values) -> Values:
        """(rows,) how far a picture's statistics are from the log's, in the samples' spreads; the largest."""
        scaled = pictures * np.array([self.factor, 1.0, 1.0]) + self.shift
        off = np.abs(np.maximum(scaled, _FLAT) - np.maximum(logged, _FLAT)) / self.spread
        found: Values = off[:, : self.used].max(1)
        return found


def _strangers(pictures: Values, logged: Values, used: int) -> Values:
    """How far apart pictures and samples are that have nothing to do with each other."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(pictures)) for _ in range(_SHUFFLES)]
    return np.concatenate([_Scale.fit(pictures[o], logged, used).apart(pictures[o], logged) for o in orders])


def _everywhere(fit: npt.NDArray[np.bool_], share: float) -> bool:
    """Whether so many fit in each segment of samples in a row."""
    segments = np.array_split(fit, max(len(fit) // _SEGMENT, 1))
    return all(float(segment.mean()) >= share for segment in segments)
