"""What holds for tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_rounding_to_tf32() -> Iterator[None]:
    """Convolutions of cuDNN round to TF32 if they may, those of a batch otherwise than those of a sample."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
