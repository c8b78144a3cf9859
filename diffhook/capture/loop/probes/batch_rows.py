"""What a loader's batch holds of the rows that a model is called on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diffhook.capture.loop.events import BatchReceived, tensors_of
from diffhook.capture.loop.identity import RowIds


class BatchRows:
    """The tensors of a batch that have a row for each of its samples.

    Args:
        event: the batch, and whose rows it has.
    """

    def __init__(self, event: BatchReceived) -> None:
        self._ids = event.ids.ids.cpu() if isinstance(event.ids, RowIds) else torch.zeros(0, dtype=torch.long)
        rows = len(self._ids)
        self._tensors = [each for each in tensors_of(event.batch) if each.dim() and len(each) == rows]

    def of(self, sample_ids: Tensor, drawn: Iterable[Tensor]) -> list[Tensor]:
        """(B, …) each: of a pass on samples of the batch, in their order; empty where that is not known.

        Args:
            sample_ids: (B,).
            drawn: what the pass has drawn. A batch that holds any of it is none of the dataset alone.
        """
        rows = self._rows(sample_ids.cpu())
        if rows is None:
            return []
        found = [each.detach().cpu()[rows] for each in self._tensors]
        return [] if any(_equal(one, other) for one in drawn for other in found) else found

    def _rows(self, sample_ids: Tensor) -> Tensor | None:
        if torch.equal(self._ids, sample_ids):
            return torch.arange(len(sample_ids))
        places = {sample: row for row, sample in enumerate(self._ids.tolist())}
        samples = sample_ids.tolist()
        if len(places) < len(self._ids) or any(sample not in places for sample in samples):
            return None
        return torch.tensor([places[sample] for sample in samples])


def _equal(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().cpu().flatten().double(), other.flatten().double()
    return one.shape == other.shape and bool(torch.isclose(one, other, rtol=1e-3).all())
