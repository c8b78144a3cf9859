"""What a log says of the grid that its probes are on: all of them share one, and queries take the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zarr.abc.store import Store

from diffhook.log import store as files
from diffhook.log.checksum import parse

GRID = "grid.json"
"""{"grid": as :meth:`diffhook.Grid.describe` gives it}, where the configuration does not tell: at the end
of a training the budget decides."""


def read_grid(store: Store, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The grid's description; None where nothing was probed, or is going to be.

    Raises:
        LogError: the file is damaged.
    """
    told = config.get("probe") or {}
    if not told:
        content = files.get(store, GRID)
        told = {} if content is None else parse(content, f"{files.describe(store)}/{GRID}")
    found = told.get("grid") if isinstance(told, dict) else None
    return found if isinstance(found, dict) else None
