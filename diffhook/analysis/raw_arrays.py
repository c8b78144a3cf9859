"""Arrays in temporary files, as bare bytes: whoever reads them knows dtype and shape.

A .npy header would be parsed by ``ast.literal_eval``, which CPython 3.11 does not survive when several
threads call it at once ("SystemError: AST constructor recursion depth mismatch").
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt


def publish(path: str, array: npt.NDArray[Any]) -> None:
    """Write an array; the file is there as a whole or not at all.

    A worker that replaces a killed one may write the same file again.
    """
    partial = f"{path}.{os.getpid()}"
    with open(partial, "wb") as file:
        np.ascontiguousarray(array).tofile(file)
    os.replace(partial, path)


def allocate(path: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """A file of zeros, to be filled by :func:`fill`."""
    with open(path, "wb") as file:
        file.truncate(math.prod(shape) * np.dtype(dtype).itemsize)


def fill(path: str, start: int, rows: npt.NDArray[Any]) -> None:
    """Put rows at position ``start`` of a file that :func:`allocate` made, in its dtype."""
    with open(path, "r+b") as file:
        file.seek(start * math.prod(rows.shape[1:]) * rows.itemsize)
        np.ascontiguousarray(rows).tofile(file)


def mapped(path: str, dtype: npt.DTypeLike, width: int | None = None) -> npt.NDArray[Any]:
    """The file's values, (n,) or (n, width), read when they are looked at."""
    rows = os.path.getsize(path) // (np.dtype(dtype).itemsize * (width or 1))
    shape = (rows,) if width is None else (rows, width)
    if not rows:
        return np.empty(shape, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, "r", shape=shape)
