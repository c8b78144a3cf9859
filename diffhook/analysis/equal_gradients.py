"""Samples whose gradients agree to rounding wherever both were probed: copies, with no look at a pixel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diffhook.analysis.execution import Execution
from diffhook.analysis.grouped import distinct_samples
from diffhook.log import Block, Table

_ROUNDING = 1e-5  # relative: a batch of another size sums in another order
_ALIKE = 0.999  # cosine of stored projections, which are rounded to half precision
_CELLS = 16  # of the grid, evenly spaced, that are compared
_MOST = 0.5  # a cell in which so many samples agree tells nothing: all noise, or a layer of zeros
_ABSENT = -1e9

Floats = npt.NDArray[np.float64]
Groups = list[npt.NDArray[np.intp]]


def equal_gradients(table: Table, execution: Execution) -> list[tuple[int, ...]]:
    """Groups of sample ids, ascending each, whose norms and losses are equal in every cell of a probe's grid:
    the same snapshot, timestep and noise. So they are of equal pictures under equal conditions.

    Where all that is compared is one cell, the projections decide; of a log without, nothing is told then.
    """
    ids = distinct_samples(table, execution)
    cells = _cells(table)
    if len(ids) < 2 or not len(cells):
        return []
    values = _values(table, ids, cells)
    telling = [cell for cell in values.transpose(1, 0, 2) if _tells(cell[:, 0])]
    if not telling or (len(telling) < 2 and not table.dim):
        return []
    columns = np.concatenate(telling, 1)
    told = (columns != _ABSENT).sum(1) >= (2 if table.dim else 4)
    groups: Groups = [np.flatnonzero(told)]
    for column in columns.T:
        groups = [part for group in groups for part in _parted(group, column)]
    if table.dim and groups:
        groups = _agreeing(table, ids, groups)
    return sorted(tuple(sorted(ids[group].tolist())) for group in groups)


def _cells(table: Table) -> npt.NDArray[np.float64]:
    """(cells, 3) snapshot, timestep and noise."""
    seen = [np.unique(_keys(table, block), axis=0) for block in table.blocks()]
    every = np.unique(np.concatenate(seen), axis=0) if seen else np.empty((0, 3))
    spaced = np.linspace(0, len(every) - 1, _CELLS) if len(every) else np.empty(0)
    chosen: npt.NDArray[np.float64] = every[np.unique(spaced.round().astype(np.intp))]
    return chosen


def _keys(table: Table, block: Block) -> Floats:
    columns = [table.read(block, name) for name in ("step", "timestep", "noise_seed")]
    return np.column_stack(columns).astype(np.float64)


def _values(table: Table, ids: npt.NDArray[np.int64], cells: Floats) -> Floats:
    """(N, cells, 2) logarithms of norm and loss; ``_ABSENT`` where there is none."""
    found = np.full((len(ids), len(cells), 2), _ABSENT)
    for block in table.blocks():
        keys = _keys(table, block)
        sample = np.searchsorted(ids, table.read(block, "sample"))
        pair = np.stack([table.read(block, name).astype(np.float64) for name in ("grad_norm", "loss")], 1)
        usable = np.isfinite(pair) & (pair > 0)
        logs = np.where(usable, np.log(np.where(usable, pair, 1.0)), _ABSENT)
        for place, cell in enumerate(cells):
            here = (keys == cell).all(1)
            found[sample[here], place] = logs[here]
    return found


def _tells(norms: Floats) -> bool:
    known = norms[norms != _ABSENT]
    return len(known) > 1 and float((np.abs(known - np.median(known)) <= _ROUNDING).mean()) < _MOST


def _parted(group: npt.NDArray[np.intp], column: Floats) -> Groups:
    """The group in parts, between which the column has a gap; those of one sample are left out."""
    order = group[np.argsort(column[group], kind="stable")]
    gaps = np.flatnonzero(np.diff(column[order]) > _ROUNDING) + 1
    return [part for part in np.split(order, gaps) if len(part) > 1]


def _agreeing(table: Table, ids: npt.NDArray[np.int64], groups: Groups) -> Groups:
    """The groups, without members whose projections are unlike the first one's in the first cell of both."""
    wanted = ids[np.concatenate(groups)]
    first: dict[int, tuple[Floats, Floats]] = {}
    for block in table.blocks():
        sample = table.read(block, "sample")
        rows = np.flatnonzero(np.isin(sample, wanted))
        if not len(rows):
            continue
        keys, projections = _keys(table, block), table.read(block, "projection")
        for row in rows.tolist():
            known = first.get(int(sample[row]))
            if known is None or tuple(keys[row]) < tuple(known[0]):
                own = projections[row].astype(np.float64)  # an estimate: of a length near 1
                first[int(sample[row])] = keys[row], own / max(np.linalg.norm(own), 1e-12)
    kept = []
    for group in groups:
        key, own = first[int(ids[group[0]])]
        alike = [
            i
            for i in group.tolist()
            if np.array_equal(first[int(ids[i])][0], key) and first[int(ids[i])][1] @ own >= _ALIKE
        ]
        if len(alike) > 1:
            kept.append(np.array(alike, np.intp))
    return kept
