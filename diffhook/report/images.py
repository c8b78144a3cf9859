"""The user's images: found by sample id, shown as thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffhook.errors import ConfigurationError

Images = Callable[[int], Any]
"""sample id → an image: PIL, or an array that :func:`to_image` takes."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def to_image(value: Any) -> Image.Image:
    """A PIL image from a PIL image or an array.

    Args:
        value: PIL image; or an array or CPU tensor of shape (H, W), (H, W, C) or (C, H, W), C = 1 or
            3, of uint8, or of floats in [0, 1] or, if any is negative, [−1, 1].

    Raises:
        ConfigurationError: another shape.
    """
    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise ConfigurationError(f"an image of shape {array.shape}; expected (H, W) or (H, W, 3)")
    if array.dtype != np.uint8:
        values = np.nan_to_num(array.astype(np.float64))  # for the eye only
        if values.min(initial=0) < 0:
            values = (values + 1) / 2
        array = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(array)


def data_uri(value: Any, size: int = 64) -> str:
    """The image as an inline PNG, ``size`` pixels on its longer side (small ones are kept sharp)."""
    image = to_image(value)
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    scale = size / max(image.size)
    shape = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    image = image.resize(shape, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def load_images(path: str | Path) -> Sequence[Any]:
    """Images in the order of their ids: a folder's image files by name, or an .npy array.

    Raises:
        ConfigurationError: neither, or nothing in it.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise ConfigurationError(f"{path} holds no image files ({', '.join(sorted(_SUFFIXES))})")
        return _Folder(files)
    if path.suffix == ".npy" and path.exists():
        array: Any = np.load(path, allow_pickle=False)
        return list(array)
    raise ConfigurationError(f"no images at {path}: expected a folder of image files, or an .npy array")


class _Folder(Sequence[Any]):
    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        try:
            with Image.open(self.files[index]) as image:
                image.load()
                return image
        except OSError as error:
            raise ConfigurationError(f"cannot read {self.files[index]}: {error}") from error
