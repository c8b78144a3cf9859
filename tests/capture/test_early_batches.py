"""What is known of batches that are fetched well before they are used."""

from __future__ import annotations

import torch

from diffhook.capture.loop.identity import RowIds, Unmatched
from diffhook.capture.loop.identity.early_batches import EarlyBatches


def test_a_batch_is_known_again_by_its_tensors_however_late_it_is_used() -> None:
    batches, kept = EarlyBatches(), [{"image": torch.rand(2, 3), "text": ["a", "b"]} for _ in range(5)]
    for number, batch in enumerate(kept):
        batches.keep(batch, RowIds(torch.tensor([number]), "dataset index"))
    for number in (3, 0, 4, 1):
        found = batches.find(dict(kept[number]))
        assert isinstance(found, RowIds)
        assert found.ids.tolist() == [number]
    assert batches.find({"image": torch.rand(2, 3), "text": ["a", "b"]}) is None
    assert batches.find({}) is None


def test_a_batch_that_is_gone_is_forgotten_and_not_taken_for_another() -> None:
    batches = EarlyBatches()
    for number in range(200):
        batches.keep({"x": torch.rand(3)}, Unmatched("unordered", str(number)))
        assert batches.find({"x": torch.rand(3)}) is None
    assert len(batches._kept) <= 2
