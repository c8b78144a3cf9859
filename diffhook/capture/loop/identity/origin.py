"""Where the rows of a batch came from, and how that travels with the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from diffhook.capture.loop.identity.matching import Kind, RowMatch
from diffhook.log.samples import ROLE_STRIDE

_KINDS: tuple[Kind, ...] = get_args(Kind)[1:]


@dataclass(frozen=True)
class Origin:
    """Where a batch came from.

    Attributes:
        dataset: the user's own dataset; None if unknown.
        indices: (N,) int64 of the items that were collated; of a stream, ids that the items hold
            themselves. None if unknown.
        rows: (R,) int64, for each row of the batch the index of its item, + role · ROLE_STRIDE. None
            where that is not shown.
        kind: why ``rows`` is None.
        source: the pass over a loader that it came from.
    """

    dataset: Any = None
    indices: Tensor | None = None
    rows: Tensor | None = None
    kind: Kind = ""
    source: object | None = None

    @property
    def streamed(self) -> bool:
        """Whether indices are ids of the items' own, and not places in the dataset."""
        return isinstance(self.dataset, IterableDataset)


def pack(indices: Tensor, match: RowMatch) -> Tensor:
    """Where a batch came from as one tensor, which Accelerate moves, joins and slices with the batch.

    The index of each row + role · ROLE_STRIDE; or, of rows not known, −1 − index − kind · ROLE_STRIDE of
    each item.
    """
    if match.rows is not None:
        return indices[match.rows % ROLE_STRIDE] + match.rows // ROLE_STRIDE * ROLE_STRIDE
    return -1 - indices - _KINDS.index(match.kind or "unordered") * ROLE_STRIDE


def unpack(packed: Tensor, dataset: Any) -> Origin:
    """The inverse of :func:`pack`; of what was joined out of several batches, rows are known if all are."""
    packed = packed.cpu()
    unknown = packed < 0
    if bool(unknown.any()):
        code = -1 - packed
        kind = _KINDS[int(code[unknown][0] // ROLE_STRIDE)]
        return Origin(dataset, torch.where(unknown, code, packed) % ROLE_STRIDE, None, kind)
    return Origin(dataset, packed[packed < ROLE_STRIDE], packed)


def at(indices: Tensor, match: RowMatch, dataset: Any = None) -> Origin:
    """Of a batch that has not travelled."""
    return unpack(pack(indices, match), dataset)
