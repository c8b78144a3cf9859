"""Chunks are encoded byte for byte as zarr would."""

from __future__ import annotations

import numpy as np
import pytest
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from diffhook.log import store as files
from diffhook.log.columns import ColumnLayout
from diffhook.log.encoding import put_chunk
from diffhook.log.schema import COLUMNS

LAYOUTS = [
    *(ColumnLayout(c.name, c.dtype, 16) for c in COLUMNS if c.name != "projection"),
    ColumnLayout("projection", "float16", 16, 3, 4),
    ColumnLayout("projection", "float16", 16, 3, 16),
    ColumnLayout("projection", "float32", 8, 5, 8),
]


def written_by_zarr(layout: ColumnLayout, start: int, rows: np.ndarray) -> Store:
    store = MemoryStore()
    array = layout.array(store, "g", start + layout.rows).with_config({"write_empty_chunks": True})
    array[start : start + len(rows)] = rows
    return store


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}-{layout.inner_rows}")
@pytest.mark.parametrize("count", [1, 4, 7, 16])
def test_a_chunk_is_what_zarr_would_write(layout: ColumnLayout, count: int) -> None:
    count = min(count, layout.rows)
    shape = (count,) if layout.dim is None else (count, layout.dim)
    rows = np.random.default_rng(count).integers(-100, 100, shape).astype(layout.dtype)
    store, start = MemoryStore(), 2 * layout.rows
    put_chunk(store, "g", layout, start, rows)
    key = layout.chunk_key("g", 2)
    found = files.get(store, key)
    assert found == files.get(written_by_zarr(layout, start, rows), key)
    read = layout.array(store, "g", start + count)[start:]
    np.testing.assert_array_equal(read, rows)


def test_a_chunk_that_holds_only_fill_values_is_written_too() -> None:
    store, layout = MemoryStore(), ColumnLayout("role", "int8", 4)
    put_chunk(store, "g", layout, 0, np.zeros(4, np.int8))
    assert files.exists(store, "g/role/c/0")


def test_rows_in_another_order_or_type_are_encoded_by_value() -> None:
    layout = ColumnLayout("projection", "float16", 4, 3, 2)
    rows = np.arange(12.0).reshape(3, 4).T  # float64, Fortran order
    store = MemoryStore()
    put_chunk(store, "g", layout, 0, rows)
    np.testing.assert_array_equal(layout.array(store, "g", 4)[:], rows)
