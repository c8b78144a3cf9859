"""What a captured step asks of a GPU does not grow unseen: counts are exact, held for two small models."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in (BENCHMARKS, BENCHMARKS.parent):
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in ("configurations", "counting", "launches"):
        sys.modules.pop(name, None)


#: name → kernels of a plain and of a captured step; a change of these numbers is a change of what a GPU pays
EXPECTED = {"unet": (1003, 1567), "transformer": (343, 674)}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_captured_steps_kernels(name: str, benchmark: Any) -> None:
    configurations, launches = benchmark("configurations"), benchmark("launches")
    made = {
        "unet": lambda: configurations.unet2d("unet", (32, 64, 128, 128), 4),
        "transformer": lambda: configurations.dit(None, 4, num_attention_heads=4, num_layers=3),
    }[name]()
    with benchmark("counting").without_values():
        plain, captured = launches.plain(made), launches.captured(made, 2048)
    assert (plain.launches, captured.launches) == EXPECTED[name]
    assert captured.launches <= 4 * plain.launches
    assert sum(launched for launched, _ in captured.kinds.values()) > 0.8 * (
        captured.launches - plain.launches
    )
    assert captured.operations > plain.operations
    assert captured.peak > plain.peak


def test_views_and_broadcasts_cost_nothing(benchmark: Any) -> None:
    import torch

    with benchmark("counting").Counting() as counting:
        row = torch.empty(1, 8, device="meta")
        row.expand(4, 8).t().detach()
        assert counting.count.launches == 0
        doubled = row.expand(4, 8) * 2
    assert counting.count.launches == 1
    assert counting.count.bytes == (8 + 4 * 8) * 4
    assert counting.count.peak == (8 + 4 * 8) * 4
    del doubled


def test_groups_of_a_convolution_are_not_multiplied_with_each_other(benchmark: Any) -> None:
    """Torch's own count takes them for one."""
    import torch

    aten = torch.ops.aten
    operations = {}
    for groups in (1, 4):
        grad, inputs = (torch.empty(2, 8, 6, 6, device="meta") for _ in range(2))
        weight = torch.empty(8, 8 // groups, 3, 3, device="meta")
        with benchmark("counting").Counting() as counting:
            aten.convolution_backward(
                grad, inputs, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), groups, (True, True, False)
            )
        operations[groups] = counting.count.operations
    assert operations[1] == 2 * 2 * (2 * 36) * 8 * 8 * 9  # both gradients: a product and a sum for each tap
    assert operations[4] == operations[1] / 4
