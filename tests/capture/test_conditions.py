"""What a denoiser's call holds besides its samples is read, or refused with the reason; nothing fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffhook.capture.loop.probes.conditions import Conditions
from diffhook.capture.objective.denoising import denoise

CLEAN = torch.zeros(4, 3, 8, 8)
TIMES = torch.arange(4)


class Open(nn.Module):
    def forward(self, x: Tensor, t: Tensor, **further: Any) -> Tensor:
        return x


class Later(nn.Module):
    """Takes its timestep after conditions."""

    def forward(self, x: Tensor, y: Tensor, timesteps: Tensor, sigma: Tensor | None = None) -> Tensor:
        return x + 2 * y.view(-1, 1, 1, 1) + 10 * timesteps.view(-1, 1, 1, 1)


class Unsaid(nn.Module):
    def forward(self, x: Tensor, **told: Any) -> Tensor:
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


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "why"),
    [
        (Later(), (CLEAN, TIMES, TIMES), {}, ""),
        (Later(), (CLEAN,), {"y": TIMES, "timesteps": TIMES}, ""),
        (Later(), (CLEAN, TIMES, TIMES, TIMES), {}, "which argument of Later is its timestep is not known"),
        (Unsaid(), (CLEAN,), {"timestep": TIMES}, "which argument of Unsaid is its timestep is not known"),
    ],
)
def test_timesteps_in_any_place(model: nn.Module, args: Any, kwargs: Any, why: str) -> None:
    conditions = Conditions()
    found = conditions.read(model, model, args, kwargs, CLEAN)
    assert conditions.refused.startswith(why)
    assert bool(why) == bool(conditions.refused)
    if not why:
        assert torch.equal(denoise(model, CLEAN, TIMES, **found), model(*args, **kwargs))


@pytest.mark.parametrize(
    ("given", "shared", "own"),
    [
        ({"img_ids": torch.zeros(4, 3)}, {"img_ids"}, set()),  # as many tokens as samples
        ({"txt_ids": torch.zeros(7, 3), "img_ids": torch.zeros(4, 7, 3)}, {"txt_ids"}, {"img_ids"}),
        ({"guidance": torch.full((4,), 3.5)}, set(), {"guidance"}),
    ],
)
def test_settings_of_a_training_need_no_proof(given: Any, shared: set[str], own: set[str]) -> None:
    model, conditions = Open(), Conditions()
    found = conditions.read(model, model, (CLEAN, TIMES), given, CLEAN)
    conditions.prove(found, lambda: [], {})
    assert (set(conditions.shared), set(found)) == (shared, own)
    assert conditions.unproven == conditions.refused == ""


@pytest.mark.parametrize(
    ("values", "dropped"),
    [
        ([0, 1, 2, 3], False),
        ([9, 9, 9, 9], True),  # all have become what others have
        ([10, 11, 12, 13], False),  # all have changed, each to its own
        ([0, 9, 2, 3], False),  # one changed: nobody else has it
        ([0, 9, 9, 3], True),
    ],
)
@pytest.mark.parametrize("name", ["encoder_hidden_states", "class_labels"])
def test_conditions_that_are_dropped(name: str, values: list[int], dropped: bool) -> None:
    def told(numbers: list[int]) -> Tensor:
        whole = torch.tensor(numbers)
        own = torch.nn.functional.one_hot(whole, 20).float()[:, None]
        return whole if name == "class_labels" else own + 1e-3 * torch.randn(own.shape)

    before, conditions = told([0, 1, 2, 3]), Conditions()
    for row in range(4):
        conditions.compare(row, row, {name: told(values)}, {name: before[row : row + 1]})
    assert dropped == ("dropped" in conditions.refused)


def test_a_value_that_is_mostly_the_same_proves_little() -> None:
    """A flag that is up at few timesteps agrees nearly always."""
    model, flag, mixed = Open(), Conditions(), Conditions()
    for _ in range(20):
        for conditions, value in ((flag, torch.zeros(4)), (mixed, torch.arange(4.0))):
            found = conditions.read(model, model, (CLEAN, TIMES), {"y": value}, CLEAN)
            conditions.prove(found, lambda: [], {row: {"y": value[row : row + 1]} for row in range(4)})
    assert "20 of 64" in flag.unproven
    assert mixed.unproven == ""
