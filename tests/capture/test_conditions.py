"""What a denoiser's call holds besides its samples is read, or refused with the reason; nothing fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffhook.capture.loop.probes.conditions import Conditions

CLEAN = torch.zeros(4, 3, 8, 8)
TIMES = torch.arange(4)


class Open(nn.Module):
    def forward(self, x: Tensor, t: Tensor, **further: Any) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((CLEAN, TIMES), {"train": True}, "given 'train', which has not a row for each sample"),
        ((CLEAN, TIMES), {"scale": 0.5}, "given 'scale', which has not a row"),
        ((CLEAN, TIMES), {"y": torch.tensor(3)}, "given 'y', which has not a row"),
        ((CLEAN, TIMES), {"y": torch.zeros(3)}, "given 'y', which has not a row"),
        ((CLEAN, TIMES), {"y": torch.zeros(4, requires_grad=True)}, "'y' comes from a model that is trained"),
        ((torch.zeros(4, 4, 8, 8), TIMES), {}, "the model's input holds more than the noisy sample"),
        ((), {"t": TIMES, "x": CLEAN, "y": TIMES, "return_dict": False}, ""),
        ((CLEAN,), {"t": TIMES, "class_labels": TIMES, "y": {"a": TIMES}}, ""),
    ],
)
def test_calls_of_any_kind(args: Any, kwargs: dict[str, Any], why: str) -> None:
    model, conditions = Open(), Conditions()
    found = conditions.read(model, model, args, kwargs, CLEAN)
    assert why in conditions.refused
    assert bool(why) == bool(conditions.refused)
    assert set(found) == (set() if why else set(kwargs) - {"t", "x", "return_dict"})


def test_a_value_that_is_mostly_the_same_proves_little() -> None:
    """A flag that is up at few timesteps agrees nearly always."""
    model, flag, mixed = Open(), Conditions(), Conditions()
    for _ in range(20):
        for conditions, value in ((flag, torch.zeros(4)), (mixed, torch.arange(4.0))):
            found = conditions.read(model, model, (CLEAN, TIMES), {"y": value}, CLEAN)
            conditions.prove(found, lambda: [], {row: {"y": value[row : row + 1]} for row in range(4)})
    assert "20 of 64" in flag.unproven
    assert mixed.unproven == ""
