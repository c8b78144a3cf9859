"""One pass over whole shards, as a dask graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask
import numpy as np
import numpy.typing as npt

from diffhook.log import Block, Table

Partial = tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]  # positions (u,), values (u, width)
Score = Callable[[Table, Block], Partial]

_ARITY = 8


def scan(table: Table, score: Score, count: int, width: int, **options: Any) -> npt.NDArray[Any]:
    """Sum ``score``'s partial results over all shards, in a fixed order.

    Args:
        table: whose blocks to go through.
        score: block → positions in [0, count), each once, and a row of ``width`` values for each.
        options: ``client`` (dask.distributed) or ``scheduler`` (dask's word: "threads" …).

    Returns:
        (count, width) float64.
    """
    layer = [dask.delayed(score)(table, block) for block in table.blocks()]
    while len(layer) > 1:
        layer = [
            dask.delayed(_merge)(layer[start : start + _ARITY]) for start in range(0, len(layer), _ARITY)
        ]
    result = np.zeros((count, width))
    if layer:
        positions, values = _compute(layer[0], **options)
        result[positions] = values
    return result


def _compute(task: Any, *, client: Any = None, scheduler: Any = None) -> Partial:
    if client is not None:
        found: Partial = client.compute(task, sync=True)
        return found
    (found,) = dask.compute(task, scheduler=scheduler or "threads")
    return found


def _merge(partials: list[Partial]) -> Partial:
    positions = np.unique(np.concatenate([p for p, _ in partials]))
    values = np.zeros((len(positions), partials[0][1].shape[1]))
    for own, part in partials:
        values[np.searchsorted(positions, own)] += part
    return positions, values


def sum_by_position(positions: npt.NDArray[Any], values: npt.NDArray[Any]) -> Partial:
    """Add up the rows of ``values`` that share a position."""
    order = np.argsort(positions, kind="stable")
    unique, starts = np.unique(positions[order], return_index=True)
    if not len(unique):
        return unique, np.zeros((0, values.shape[1]))
    return unique, np.add.reduceat(values[order].astype(np.float64), starts, axis=0)
