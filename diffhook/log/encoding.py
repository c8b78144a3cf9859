"""The bytes of a chunk, as zarr's codecs make them, without their copies: 16 MiB go from memory to the file.

Reading is left to zarr.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from zarr.abc.store import Store

from diffhook.log import store as files
from diffhook.log.columns import ColumnLayout
from diffhook.log.schema import BY_NAME

Parts = Sequence[bytes | memoryview]

_ABSENT = (1 << 64) - 1  # in a shard's index: no such chunk


def put_chunk(store: Store, path: str, layout: ColumnLayout, start: int, rows: npt.NDArray[Any]) -> None:
    """Write the chunk or shard that begins with row ``start`` of a group's column; see :func:`encode`."""
    key = layout.chunk_key(path, start // layout.rows)
    files.set_uncommitted(store, key, *encode(layout, rows))


def encode(layout: ColumnLayout, rows: npt.NDArray[Any]) -> Parts:
    """A chunk's or shard's file, in parts that follow each other.

    Args:
        rows: (rows,) or (rows, D), the first ones of the chunk; the others hold the fill value, and in
            a shard the chunks after them are absent.
    """
    size = layout.inner_rows or layout.rows
    parts: list[bytes | memoryview] = []
    index = np.full((layout.rows // size, 2), _ABSENT, "<u8")  # offset and bytes of each chunk
    offset = 0
    for number, start in enumerate(range(0, len(rows), size)):
        chunk = _filled(layout, rows[start : start + size], size)
        parts += _with_checksum(chunk)
        index[number] = offset, chunk.nbytes + 4
        offset += chunk.nbytes + 4
    if layout.dim is not None:
        parts += _with_checksum(index)
    return parts


def _filled(layout: ColumnLayout, rows: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    dtype = np.dtype(layout.dtype).newbyteorder("<")
    if len(rows) == size:
        return np.ascontiguousarray(rows, dtype)
    chunk = np.full((size, *rows.shape[1:]), BY_NAME[layout.name].fill, dtype)
    chunk[: len(rows)] = rows
    return chunk


def _with_checksum(content: npt.NDArray[Any]) -> tuple[memoryview, bytes]:
    content = content.reshape(-1).view(np.uint8)
    return content.data, google_crc32c.value(content).to_bytes(4, "little")
