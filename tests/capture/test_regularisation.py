"""A batch tells which of its rows are regularisation images, in each trainer's words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffhook.capture.samples.regularisation import regularisation_ids

IDS = torch.tensor([4, 7, 9])
ITEMS = [SimpleNamespace(path="a.png", is_reg=mark) for mark in (False, True, False)]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"is_reg": [False, True, True]}, {7, 9}),
        ({"is_reg": torch.tensor([True, False, False])}, {4}),
        ({"is_regularisation_data": True}, {4, 7, 9}),
        ({"is_regularisation_data": False}, set()),
        ({"concept_type": ["STANDARD", "PRIOR_PREDICTION", "STANDARD"]}, {7}),
        ({"latents": torch.zeros(3, 1), "file_items": ITEMS}, {7}),
        ({"is_reg": [True]}, set()),  # of other rows
        ({"is_reg": None, "image_keys": ["a", "b", "c"]}, set()),
        (torch.zeros(3, 1), set()),
    ],
)
def test_rows_have_the_role_that_the_batch_tells(batch: Any, expected: set[int]) -> None:
    assert regularisation_ids(batch, IDS) == expected
