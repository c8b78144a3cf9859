"""One column on disk: a zarr array whose metadata says nothing that the schema does not expect."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.storage import StorePath

from diffhook.errors import LogError
from diffhook.log import store as files
from diffhook.log.schema import BY_NAME

_MOST_ROWS = 1 << 48
_MOST_CHUNK_ROWS = 1 << 20
_LARGEST_CHUNK = 1 << 32  # bytes
_CHECKSUM = {"name": "crc32c"}


@dataclass(frozen=True)
class ColumnLayout:
    """How a column's array is stored.

    Attributes:
        name: the column's.
        dtype: numpy's name of it.
        rows: rows of a shard (projection) or chunk (all others).
        dim: D, for the projection; None for scalars.
        inner_rows: rows of a chunk within a shard.
    """

    name: str
    dtype: str
    rows: int
    dim: int | None = None
    inner_rows: int = 0

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * (self.dim or 1)

    def chunk_key(self, path: str, index: int) -> str:
        """Key of the file that holds rows [index · rows, (index + 1) · rows)."""
        return f"{path}/{self.name}/c/{index}" + ("" if self.dim is None else "/0")

    def metadata(self, length: int) -> dict[str, Any]:
        """The array's zarr.json."""
        trailing = [] if self.dim is None else [self.dim]
        fill = BY_NAME[self.name].fill
        integer = self.dtype.startswith("int")
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [length, *trailing],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.rows, *trailing]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": int(fill) if integer else "NaN" if np.isnan(fill) else float(fill),
            "codecs": [self._sharding()] if self.dim is not None else [self._bytes(), _CHECKSUM],
            "attributes": {},
            "dimension_names": ["row", *(["projection_dim"] if self.dim is not None else [])],
            "storage_transformers": [],
        }

    def array(self, store: Store, path: str, length: int) -> zarr.Array[Any]:
        """The array, of which ``length`` rows are looked at, whatever its zarr.json says."""
        return zarr.Array.from_dict(StorePath(store, f"{path}/{self.name}"), self.metadata(length))

    def _bytes(self) -> dict[str, Any]:
        one_byte = np.dtype(self.dtype).itemsize == 1
        return {"name": "bytes"} if one_byte else {"name": "bytes", "configuration": {"endian": "little"}}

    def _sharding(self) -> dict[str, Any]:
        return {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [self.inner_rows, self.dim],
                "codecs": [self._bytes(), _CHECKSUM],
                "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, _CHECKSUM],
                "index_location": "end",
            },
        }


def new_layout(name: str, dim: int, projection: str, rows: int) -> ColumnLayout:
    """The layout in which columns are written today.

    Args:
        dim, projection: D and dtype of the projection.
        rows: of a shard.
    """
    if name != "projection":
        return ColumnLayout(name, BY_NAME[name].dtype, rows)
    return ColumnLayout(name, projection, rows, dim, 512 if rows % 512 == 0 else rows)


def read_layout(store: Store, path: str, name: str) -> tuple[ColumnLayout, int]:
    """The layout of a column found in a log, and its number of rows.

    Nothing is believed: a log may come from anywhere.

    Raises:
        LogError: the metadata is damaged or absurd.
    """
    place = f"{path}/{name}/zarr.json"
    content = files.get(store, place) or b""
    try:
        return _checked(name, content)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise LogError(f"{place} is damaged: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=512)  # the columns of all ranks and tables are described in the same few ways
def _checked(name: str, content: bytes) -> tuple[ColumnLayout, int]:
    found = json.loads(content)
    layout, length = _layout(name, found)
    _check(layout, length)
    differing = _difference(found, layout.metadata(length))
    if differing:
        raise ValueError(differing)
    return layout, length


def _layout(name: str, found: dict[str, Any]) -> tuple[ColumnLayout, int]:
    shape = found["shape"]
    chunk = found["chunk_grid"]["configuration"]["chunk_shape"]
    if not all(type(n) is int for n in [*shape, *chunk]):
        raise ValueError(f"shape {shape} in chunks of {chunk}")
    projection = name == "projection"
    if len(shape) != len(chunk) or len(shape) != 1 + projection:
        raise ValueError(f"shape {shape} in chunks of {chunk}")
    dtypes = ("float16", "float32") if projection else (BY_NAME[name].dtype,)
    if found["data_type"] not in dtypes:
        raise ValueError(f"data type {found['data_type']!r}; expected {' or '.join(dtypes)}")
    inner = found["codecs"][0]["configuration"]["chunk_shape"][0] if projection else 0
    dim = shape[1] if projection else None
    return ColumnLayout(name, found["data_type"], chunk[0], dim, inner), shape[0]


def _check(layout: ColumnLayout, length: int) -> None:
    if not (0 <= length <= _MOST_ROWS and 0 < layout.rows <= _MOST_CHUNK_ROWS) or (
        layout.dim is not None and layout.dim < 1
    ):
        raise ValueError(f"{length} rows in chunks of {layout.rows}")
    if layout.rows * layout.row_bytes > _LARGEST_CHUNK:
        raise ValueError(f"chunks of {layout.rows * layout.row_bytes:,} bytes; {_LARGEST_CHUNK:,} at most")
    if layout.dim is not None and (type(layout.inner_rows) is not int or layout.inner_rows < 1):
        raise ValueError(f"chunks of {layout.inner_rows!r} rows in a shard")
    if layout.dim is not None and layout.rows % layout.inner_rows:
        raise ValueError(f"shards of {layout.rows} rows in chunks of {layout.inner_rows}")


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first part of the metadata that is not as it would be written."""
    for key, value in expected.items():
        if _json(found.get(key)) != _json(value):
            return f"{key} is {_json(found.get(key))[:200]}; expected {_json(value)}"
    return ""


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
