"""Tests do not inherit the precision of an Accelerator that another test has made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _own_precision() -> Iterator[None]:
    yield
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=True)
