"""A torch sampler over chosen indices of a dataset."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler


class KeptSampler(Sampler[int]):
    """The given indices, in a new order every epoch, or always in their own.

    Args:
        indices: (n,).
        shuffle: a new order every time it is gone through.
        seed: of the orders.
    """

    def __init__(self, indices: npt.NDArray[np.int64], *, shuffle: bool = True, seed: int = 0) -> None:
        self.indices = indices
        self.shuffle = shuffle
        self._orders = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        order = self._orders.permutation(self.indices) if self.shuffle else self.indices
        yield from order.tolist()
