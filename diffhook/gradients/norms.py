"""Accurate norms of long vectors."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1024


def squared_norms(rows: Tensor) -> Tensor:
    """(b,) float64 squared L2 norms of the rows of a (b, n) tensor.

    Summed in pieces: one float32 norm over millions of columns is off by 2e-4, and storing the squares
    would cost as much memory traffic as everything else.
    """
    count, length = rows.shape
    if length < 16 * _PIECE:
        return torch.linalg.vecdot(rows, rows).double()
    whole = length - length % _PIECE
    total = rows[:, whole:].double().square().sum(1)
    if whole:
        pieces = rows[:, :whole].view(count, -1, _PIECE)
        total += torch.linalg.vector_norm(pieces, dim=2).double().square().sum(1)
    return total
