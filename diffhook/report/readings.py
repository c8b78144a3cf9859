"""What a training loop may have made of a picture before its model saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffhook.images import to_image

Step = Callable[[Image.Image], Image.Image]
Reading = tuple[Step, ...]

_LARGEST = 512  # pixels of a side: a picture of several times as many is averaged first, to be quick


def readings(mode: str, size: tuple[int, int] | None) -> list[Reading]:
    """Ways to read a picture, the plainest first.

    Args:
        mode: "L" or "RGB", what the model was trained on.
        size: (height, width) to which each reading may be resized, too.
    """
    grounds: list[Step] = [_whole, partial(_flattened, ground=255), partial(_flattened, ground=0)]
    colours: list[Step] = [partial(_converted, mode=mode)]
    hues: list[Step] = [_whole] if mode == "L" else [_whole, _grey]
    shapes: list[Step] = [_whole, _centre, partial(_padded, ground=0), partial(_padded, ground=255)]
    sizes: list[Step] = [_whole] if size is None else [_whole, partial(_resized, size=size)]
    return list(product(grounds, colours, [_smaller], hues, shapes, sizes))


def read(image: Any, ways: Iterable[Reading]) -> npt.NDArray[np.float64]:
    """(ways, 3) the statistics of whatever :func:`~diffhook.images.to_image` takes, as each way reads it.
    What changes nothing is done once."""
    made: dict[tuple[int, Step], Image.Image] = {}
    figures: dict[int, npt.NDArray[np.float64]] = {}
    first, found = to_image(image), []
    for way in ways:
        picture = first
        for step in way:
            key = (id(picture), step)
            picture = made[key] if key in made else made.setdefault(key, step(picture))
        if id(picture) not in figures:
            figures[id(picture)] = figures_of(picture)
        found.append(figures[id(picture)])
    return np.stack(found)


def figures_of(picture: Image.Image) -> npt.NDArray[np.float64]:
    """(3,) the :data:`diffhook.appearance.STATISTICS` of a picture in grey or colour."""
    values = np.asarray(picture, np.float64).reshape(picture.height, picture.width, -1) / 255
    steps = np.concatenate([np.diff(values, axis=axis).ravel() for axis in (0, 1)])
    rough = float(np.sqrt((steps**2).mean())) if len(steps) else 0.0
    return np.array([values.mean(), values.std(), rough])


def _whole(picture: Image.Image) -> Image.Image:
    return picture


def _flattened(picture: Image.Image, ground: int) -> Image.Image:
    """What is transparent, on a ground."""
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture
    below = Image.new("RGBA", picture.size, (ground, ground, ground, 255))
    return Image.alpha_composite(below, picture.convert("RGBA"))


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    return picture if picture.mode == mode else picture.convert(mode)


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _smaller(picture: Image.Image) -> Image.Image:
    factor = max(picture.size) // _LARGEST
    return picture.reduce(factor) if factor > 1 else picture


def _centre(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)) if picture.width != picture.height else picture


def _padded(picture: Image.Image, ground: int) -> Image.Image:
    side = max(picture.size)
    if picture.width == picture.height:
        return picture
    square = Image.new(picture.mode, (side, side), (ground,) * len(picture.getbands()))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    same = picture.size == (width, height)
    return picture if same else picture.resize((width, height), Image.Resampling.BILINEAR)
