"""Adam's divisors: what the real optimiser divides by, or the reason why there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffhook.capture.recording.preconditioner import adam_preconditioner


def stepped(kind: Any, gradients: list[Tensor], **options: Any) -> tuple[nn.Parameter, Any, Tensor]:
    """A parameter after a step per gradient, its optimiser, and by how much the last step moved it."""
    parameter = nn.Parameter(torch.linspace(-1, 1, gradients[0].numel(), dtype=torch.float64))
    optimizer = kind([parameter], **options)
    before = parameter.detach().clone()
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter, optimizer, parameter.detach() - before


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "eps": 1e-3}),
        (torch.optim.NAdam, {}),
    ],
    ids=["adam", "amsgrad", "adamw", "nadam"],
)
def test_without_momentum_a_step_is_the_rate_times_factor_times_gradient(
    kind: Any, options: dict[str, Any]
) -> None:
    """The last gradient is small: then amsgrad's largest moment differs from the last."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(7, generator=generator, dtype=torch.float64) * s for s in (1.0, 2.0, 0.1)]
    parameter, optimizer, moved = stepped(kind, gradients, lr=0.5, betas=(0.0, 0.9), **options)
    factor = adam_preconditioner(optimizer, {"w": parameter})["w"]
    assert factor.dtype == torch.float32
    torch.testing.assert_close(-0.5 * factor.double() * gradients[-1], moved, rtol=1e-5, atol=1e-8)


def test_elements_that_no_gradient_has_reached_have_factor_0() -> None:
    parameter, optimizer, _ = stepped(torch.optim.AdamW, [torch.tensor([0.0, 2.0]).double()])
    idle = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [idle]})
    factors = adam_preconditioner(optimizer, {"w": parameter, "idle": idle})
    assert factors["w"][0] == 0
    assert factors["w"][1] == pytest.approx(0.5)
    assert factors["idle"].tolist() == [0, 0, 0]


def test_every_group_has_its_own_constants() -> None:
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([{"params": [one], "eps": 1.0}, {"params": [other], "eps": 3.0}])
    for parameter in (one, other):
        parameter.grad = torch.ones(1)
    optimizer.step()
    factors = adam_preconditioner(optimizer, {"one": one, "other": other})
    assert [float(factors[name]) for name in ("one", "other")] == pytest.approx([1 / 2, 1 / 4])


def test_where_there_is_none_the_reason_is_told() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="SGD is not Adam, AdamW or NAdam"):
        adam_preconditioner(torch.optim.SGD([parameter], lr=1.0), {"w": parameter})
    with pytest.raises(ValueError, match="AdamW has taken no step"):
        adam_preconditioner(torch.optim.AdamW([parameter]), {"w": parameter})
    moved, optimizer, _ = stepped(torch.optim.Adam, [torch.ones(2).double()])
    with pytest.raises(ValueError, match=r"text.w \(1 such\) belongs to another optimizer"):
        adam_preconditioner(optimizer, {"w": moved, "text.w": parameter})
