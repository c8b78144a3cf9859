"""Arrays, tensors and files as pictures."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffhook.errors import ConfigurationError

_MOST_PIXELS = 100_000_000


def to_image(value: Any) -> Image.Image:
    """A PIL image.

    Args:
        value: a PIL image; the bytes of an image file; or an array or CPU tensor of shape (H, W),
            (H, W, C) or (C, H, W), C = 1 or 3, of integers in 0 … 255, or of floats in [0, 1] or, if any
            is negative, [−1, 1], and cut to that.

    Raises:
        ConfigurationError: another shape, or other integers.
    """
    if isinstance(value, bytes):
        value = open_image(io.BytesIO(value))
    if isinstance(value, Image.Image):
        _check_size(value)
        if value.mode != "F" and not value.mode.startswith("I"):
            return value
        value = _scaled_down(value)
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise ConfigurationError(f"an image of shape {array.shape}; expected (H, W) or (H, W, 3)")
    if array.dtype.kind in "iu":
        low, high = array.min(initial=0), array.max(initial=0)
        if low < 0 or high > 255:
            raise ConfigurationError(f"an image of integers from {low} to {high}; expected 0 to 255")
        array = array.astype(np.uint8)
    else:
        values = np.nan_to_num(array.astype(np.float64))  # for the eye only
        if values.min(initial=0) < 0:
            values = (values + 1) / 2
        array = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(array)


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """An image file's picture, in memory.

    Raises:
        ConfigurationError: it has more than 100 million pixels: a small file can claim any number.
        OSError: it cannot be read, or is no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the limit
            image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ConfigurationError(f"too large an image: {error}") from error
    with image:
        _check_size(image)
        image.load()
        return image


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > _MOST_PIXELS:
        raise ConfigurationError(
            f"an image of {width:,} × {height:,} pixels; {_MOST_PIXELS // 10**6:,} million are read at most"
        )


def _scaled_down(image: Image.Image) -> npt.NDArray[Any]:
    """An image of 16 bits a pixel, which Pillow would cut off at 8, and one of 32, which may hold 16."""
    array = np.asarray(image)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and array.max(initial=0) > 255)
    return array >> 8 if deep else array


def png(value: Any, size: int) -> bytes:
    """The image as a PNG, at most ``size`` pixels on its longer side, for a log.

    Args:
        value: see :func:`to_image`.
    """
    buffer = io.BytesIO()
    shrunk(value, size).save(buffer, "PNG")
    return buffer.getvalue()


def shrunk(value: Any, size: int) -> Image.Image:
    """The image in a mode that PNG and WebP can hold, at most ``size`` pixels on its longer side."""
    image = _displayable(to_image(value))
    longest = max(image.size)
    if longest <= size:
        return image
    width, height = (max(round(side * size / longest), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _displayable(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB", "RGBA"):
        return image
    return image.convert("RGBA" if "transparency" in image.info or image.mode in ("LA", "PA") else "RGB")
