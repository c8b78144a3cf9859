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
from diffhook.appearance import COLUMNS, on_scale
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog
from diffhook.log.samples import ROLE_STRIDE
from diffhook.report.likeness_fit import Displaced, Fit, Values, displacement
from diffhook.report.readings import Reading, read, readings

Images = Callable[[int], Any]
"""sample id → an image that :func:`to_image` takes, or None where there is none."""

_BLOCKS, _BLOCK = 32, 16  # so many times so many pictures in a row are compared before any is shown
_TRIED = 48  # pictures that are read in every way
_FEWEST = 16  # of which one can say whether pictures fit
MOST, _SOME = 0.5, 0.25  # of the pictures must fit; where names say whose each is
_DISPLACED = 0.1  # of the pictures: so many others would fit if they lay some places away


class WrongPictureError(ConfigurationError):
    """A picture is not that of its sample."""


@dataclass(frozen=True)
class Judgement:
    """What was found of a set of pictures.

    Attributes:
        fits: whether they are the training's; None where the log cannot tell.
        share: of the pictures compared, those that fit.
        checked: the pictures; one that does not fit its sample raises a WrongPictureError.
        displaced: where they lie in another order, the samples that fit so many places further on.
    """

    fits: bool | None
    share: float
    checked: Images
    displaced: Displaced | None = None


class Likeness:
    """Compares pictures with what the log knows of their samples.

    Both sides' statistics come to one scale, whatever range the loop trains in. A loop may crop, pad, resize
    or recolour its pictures, so they are read in several ways, and each statistic counts by how far it
    usually differs: an average over neighbours keeps the mean, but not contrast and roughness. Whether a
    picture fits is decided by how near strangers are: the same pictures, moved on by some places.

    Args:
        ids: (N,) ascending.
        statistics: (N, 3) means over the visits of ``diffhook.appearance.STATISTICS``, as the log has them.
        channels: 1 or 3, of what the model was trained on.
        size: (height, width) that it was trained on, where that is known.
    """

    def __init__(
        self,
        ids: npt.NDArray[np.int64],
        statistics: Values,
        channels: int,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.readings = readings("L" if channels == 1 else "RGB", size)
        known = np.isfinite(statistics).all(1) & (ids < ROLE_STRIDE)
        self.ids, self.statistics = ids[known], on_scale(statistics[known])

    @classmethod
    def of(cls, log: RunLog, execution: Execution | None = None) -> Likeness | None:
        """None where the log knows nothing of its samples' pixels: of latents, or without statistics."""
        model = log.config["identity"].get("model") or {}
        shape = _seen(log)
        channels = (model.get("config") or {}).get("in_channels") if shape is None else shape[0]
        table = appearance_table(log)
        if channels not in (1, 3) or table is None:
            return None
        view = View(log, table.name, table, execution or Execution())
        means = [view.means(table, column)[0] for column in COLUMNS]
        found = cls(
            view.sample_ids,
            np.column_stack(means).astype(np.float64),
            channels,
            _size(model) or (shape and shape[1:]),
        )
        return found if len(found.ids) >= _FEWEST else None

    def judge(self, images: Images, named: bool = False) -> Judgement:
        """Compare some hundred pictures, some in a row each time; then each that is asked for.

        Args:
            named: each picture was found by its sample's name, so that no order can be wrong.
        """
        asked = self._asked()
        reading = self._best_reading(images, asked[:: max(len(asked) // _TRIED, 1)])
        seen = [(i, found[0]) for i in asked if (found := self._figures(images, i, [reading])) is not None]
        if len(seen) < _FEWEST:
            return Judgement(None, 1.0, images)
        places, pictures = np.array([i for i, _ in seen]), np.stack([found for _, found in seen])
        logged = self.statistics[places]
        fit = Fit.of(pictures, logged)
        displaced = None if named else displacement(self.ids[places], pictures, logged, fit.scale)
        if displaced and fit.exact and displaced.count < _DISPLACED * len(places):
            displaced = None  # each of them is seen to be another's
        fits = displaced is None and fit.share >= (_SOME if named else MOST)
        return Judgement(fits, fit.share, self._checked(images, reading, fit), displaced)

    def _asked(self) -> npt.NDArray[np.intp]:
        """Positions: all; or runs of some in a row, where a missing file shows as a shift."""
        count = len(self.ids)
        if count <= _BLOCKS * _BLOCK:
            return np.arange(count)
        starts = np.linspace(0, count - _BLOCK, _BLOCKS).round().astype(np.intp)
        return np.unique(starts[:, None] + np.arange(_BLOCK))

    def _best_reading(self, images: Images, places: npt.NDArray[np.intp]) -> Reading:
        """The way to read pictures in which they fit best: the plainest of those that are as good."""
        seen = [(i, found) for i in places if (found := self._figures(images, i, self.readings)) is not None]
        if len(seen) < _FEWEST:
            return self.readings[0]
        logged, pictures = self.statistics[[i for i, _ in seen]], np.stack([found for _, found in seen])
        _, different = np.unique(pictures, axis=1, return_index=True)
        fits = {way: Fit.of(pictures[:, way], logged) for way in sorted(different.tolist())}
        best = max(fits, key=lambda way: (fits[way].exact, round(fits[way].share, 1), -fits[way].strangers))
        return self.readings[best]

    def _checked(self, images: Images, reading: Reading, fit: Fit) -> Images:
        def checked(sample: int) -> Any:
            image = images(sample)
            place = int(np.searchsorted(self.ids, sample))
            if image is None or place == len(self.ids) or self.ids[place] != sample:
                return image
            own = on_scale(read(image, [reading]))
            if fit.scale.ratio(own, self.statistics[place][None])[0] > fit.limit:
                raise WrongPictureError(
                    "not what the training saw: its mean, contrast or roughness is another"
                )
            return image

        return checked

    def _figures(self, images: Images, place: int, ways: list[Reading]) -> Values | None:
        """(ways, 3); None of a picture that is not there or cannot be read, which is told where it is to be
        shown."""
        try:
            image = images(int(self.ids[place]))
            return None if image is None else on_scale(read(image, ways))
        except (OSError, ValueError, LookupError, TypeError):
            return None


def _seen(log: RunLog) -> tuple[int, int, int] | None:
    """Channels, height and width of what the training's first batch held, pictures or latents."""
    shape = (log.config.get("inputs") or {}).get("shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        return None
    return shape[0], shape[1], shape[2]


def _size(model: Any) -> tuple[int, int] | None:
    """Of what a model of diffusers is trained on, where its config says so."""
    size = (model.get("config") or {}).get("sample_size")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    return (int(sides[0]), int(sides[1])) if all(isinstance(s, int) and s > 0 for s in sides) else None
