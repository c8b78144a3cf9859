"""Accurate norms of long vectors."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from diffhook.gradients.products import is_half

_PIECE = 2048


def piece_norms(rows: Tensor) -> Tensor:
    """(b, n) → (b, k): L2 norms of k pieces of every row. Their squares, added in float64, are the row's.

    Float32 of rows in half precision. One kernel, and one pass over the numbers. A float32 norm over millions
    of columns would be off by 2e-4, and storing the squares would cost as much memory traffic as everything
    else.
    """
    piece = _piece(rows.shape[1])
    if rows.shape[1] % piece:
        rows = F.pad(rows, (0, -rows.shape[1] % piece))
    dtype = torch.float32 if is_half(rows) else None
    return torch.linalg.vector_norm(rows.reshape(len(rows), -1, piece), dim=2, dtype=dtype)


@cache
def _piece(length: int) -> int:
    """The longest piece that divides the row; a row without a good divisor is padded."""
    divisors = (piece for piece in range(min(length, _PIECE), _PIECE // 16, -1) if length % piece == 0)
    return max(length, 1) if length <= _PIECE else next(divisors, _PIECE)
