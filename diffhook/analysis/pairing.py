"""Which rows of a query set may be set against which training rows: those whose noise fits.

The training's own rows each drew noise of their own. A noise that queries had in common would give them a
common direction against these, and every query would name the same samples. On a grid it is the other way
round: probe and query share their noise draw by draw, and differ in the sample alone.
"""

from __future__ import annotations

import logging
from typing import Any

from diffhook.analysis.tables import query_table
from diffhook.errors import ConfigurationError
from diffhook.log import RunLog, Table

logger = logging.getLogger("diffhook")

SOURCES = ("train", "probe")
"""What a query set can be set against: the training's own rows, and rows on the grid with the same noise."""

TRAIN, PROBE = SOURCES


def kind_of(source: str) -> str:
    """The kind of a source's rows: a query set of training samples is of the grid, as probes are."""
    return TRAIN if source == TRAIN else PROBE


def probe_grid(log: RunLog) -> dict[str, Any] | None:
    """The grid of the log's probes, as :meth:`diffhook.Grid.describe` gives it; None where there are none."""
    return log.grid if len(log.probe) else None


def serves(log: RunLog, queries: str, kind: str) -> bool:
    """Whether a query set holds rows to be set against a kind of rows."""
    return kind in (_described(query_table(log, queries)).get("against") or ())


def holds_replicates(log: RunLog, source: str, replicates: int) -> bool:
    """Whether rows on the grid hold so many replicates of their noise."""
    found = _source_grid(log, source) or {}
    return int(found.get("replicates", 1)) == replicates


def check_noise(log: RunLog, source: str, queries: str) -> None:
    """The queries must hold rows for the source's kind; those of the grid should be on the source's grid.

    Warns where grids differ: scores are computed, but most of the noise is not shared.

    Raises:
        ConfigurationError: they hold none; says how to make them.
    """
    kind = kind_of(source)
    _check_kind(query_table(log, queries), queries, kind)
    if kind == TRAIN:
        return
    if source != PROBE:
        _check_kind(query_table(log, source), source, kind)
    asked, own = _grid(query_table(log, queries)), _source_grid(log, source)
    if asked != own:
        logger.warning(
            "queries %r are on the grid %s, source %r is on %s: they do not share all of their noise, and "
            "scores tell less. diffhook.query(...) takes the probes' grid unless it is given another",
            queries, _told(asked), source, _told(own),
        )  # fmt: skip


def _check_kind(table: Table, name: str, kind: str) -> None:
    held = _described(table).get("against") or ()
    if kind not in held:
        found = _MEANING[held[0]] if held else "noise of which the log says nothing"
        raise ConfigurationError(
            f"queries {name!r} have {found}, and this source needs {_MEANING[kind]}: ask "
            f"diffhook.query(..., {name!r}, against={kind!r}, overwrite=True)"
        )


_MEANING = {
    TRAIN: "noise of their own, for the training's own rows",
    PROBE: "the noise that a grid shares, for probes",
}


def _source_grid(log: RunLog, source: str) -> Any:
    return probe_grid(log) if source == PROBE else _grid(query_table(log, source))


def _grid(table: Table) -> Any:
    return _described(table).get("grid")


def _described(table: Table) -> dict[str, Any]:
    return table.description or {}


def _told(grid: Any) -> str:
    """S × M × R, and the seed."""
    if grid is None:
        return "that the log does not tell"
    steps = grid["timesteps"]
    count = steps if isinstance(steps, int) else len(steps)
    return (
        f"{count} timesteps × {grid['draws']} draws × {grid['replicates']} replicates (seed {grid['seed']})"
    )
