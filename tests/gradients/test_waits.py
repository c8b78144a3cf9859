"""Nothing that the engine does in an ordinary pass waits for a device: no value is read on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from diffhook.gradients import PerSampleGradients, host
from tests.models import PROBLEMS

READS = ("item", "cpu", "numpy", "tolist", "__float__", "__bool__", "__int__", "__index__")


@contextmanager
def reads() -> Iterator[Counter[str]]:
    """Counts calls that read a tensor's values."""
    found: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return original(tensor, *args, **kwargs)

        return read

    patches = [mock.patch.object(Tensor, name, counted(name)) for name in READS]
    for patch in patches:
        patch.start()
    try:
        yield found
    finally:
        for patch in patches:
            patch.stop()


@pytest.mark.parametrize("dim", [0, 256, "full"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_an_ordinary_pass_reads_no_value(name: str, dim: Any) -> None:
    model, loss, batch = PROBLEMS[name]()
    with reads() as plain:
        loss(model, batch).mean().backward()
    engine = PerSampleGradients(model, projection_dim=dim)
    with mock.patch.object(host, "read", side_effect=host.read) as read:
        for _ in range(2):
            before = read.call_count
            with reads() as found, engine:
                loss(model, batch).mean().backward()
            waits = read.call_count - before
        assert found == plain
        assert waits == 0
        assert read.call_count <= 5, "the checked pass reads its verdicts together"


def test_reads_are_seen() -> None:
    with reads() as found:
        bool(torch.ones(()) > 0)
        torch.ones(2).tolist()
    assert found == {"__bool__": 1, "tolist": 1}
