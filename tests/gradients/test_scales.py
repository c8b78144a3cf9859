"""Reductions, accumulation and loss scales are undone; projections keep inner products."""

from __future__ import annotations

import pytest
import torch

from diffhook.errors import CaptureError, ConfigurationError
from diffhook.gradients import PerSampleGradients
from diffhook.gradients.signs import signs
from tests.models import PROBLEMS, unet
from tests.twins import projected, relative_error, sample_gradients


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 1 / 4, 65536.0])
def test_a_row_is_the_gradient_of_the_samples_own_loss(reduction: str, scale: float) -> None:
    model, loss, batch = unet()
    engine = PerSampleGradients(model, projection_dim="full", reduction=reduction)  # type: ignore[arg-type]
    engine.loss_scale = scale
    with engine:
        losses = loss(model, batch)
        (getattr(losses, reduction)() * scale).backward()
    expected = sample_gradients(model, loss, batch)
    assert relative_error(engine.projections, expected) < 1e-5
    assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5


def test_projections_keep_inner_products_without_bias() -> None:
    model, loss, batch = unet(batch=6)
    gradients = sample_gradients(model, loss, batch)
    exact = gradients @ gradients.T
    scale = gradients.norm(dim=1)[:, None] * gradients.norm(dim=1)
    found = []
    for seed in range(40):
        engine = PerSampleGradients(model, projection_dim=256, seed=seed)
        with engine:
            loss(model, batch).mean().backward()
        found.append((engine.projections @ engine.projections.T).double())
    errors = (torch.stack(found) - exact) / scale
    # One estimate errs by about √(2/D); the mean of 40 unbiased ones by √40 less: 4 deviations.
    assert errors.std(0).max() < 1.6 * (2 / 256) ** 0.5
    assert errors.mean(0).abs().max() < 4 * (2 / 256) ** 0.5 / 40**0.5


def test_signs_depend_on_seed_and_name_only() -> None:
    long = signs(0, "conv.weight", 1000)
    assert (signs(0, "conv.weight", 10) == long[:10]).all(), "not prefix-stable"
    assert (signs(1, "conv.weight", 1000) != long).any()
    assert (signs(0, "conv.bias", 1000) != long).any()
    assert set(long) == {-1, 1}
    # Golden: a log of yesterday must be comparable with one of tomorrow.
    assert long[:16].tolist() == GOLDEN


GOLDEN = [-1, -1, 1, -1, 1, -1, 1, 1, 1, -1, -1, 1, -1, -1, -1, 1]


def test_bad_arguments_say_what_was_expected() -> None:
    model = unet().model
    with pytest.raises(ConfigurationError, match="projection_dim is -1; expected an integer"):
        PerSampleGradients(model, projection_dim=-1)
    with pytest.raises(ConfigurationError, match="group_size is 0"):
        PerSampleGradients(model, group_size=0)
    with pytest.raises(ConfigurationError, match="reduction is 'max'"):
        PerSampleGradients(model, reduction="max")  # type: ignore[arg-type]
    model.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="no parameter with requires_grad=True"):
        PerSampleGradients(model)


def test_a_missing_backward_is_an_error_and_leaves_the_model_clean() -> None:
    model, loss, batch = unet()
    engine = PerSampleGradients(model, weight_gradients=False)
    with pytest.raises(CaptureError, match="was backward"):
        with engine:
            loss(model, batch)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("dim", [0, 256, "full"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_preconditioner_multiplies_gradients_before_norms_and_projections(name: str, dim: int) -> None:
    model, loss, batch = PROBLEMS[name]()
    torch.manual_seed(2)
    factors = {n: torch.rand_like(p) for n, p in model.named_parameters() if p.requires_grad}
    expected = sample_gradients(model, loss, batch) * torch.cat([f.flatten() for f in factors.values()])
    engine = PerSampleGradients(model, projection_dim=dim)
    engine.preconditioner = factors
    for _ in range(2):
        with engine:
            loss(model, batch).mean().backward()
    assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5
    if dim == "full":
        assert relative_error(engine.projections, expected) < 1e-5
    elif dim:
        assert relative_error(engine.projections, projected(engine.sketch, model, expected)) < 1e-5


def test_a_preconditioner_that_does_not_fit_is_refused() -> None:
    engine = PerSampleGradients(unet().model)
    engine.preconditioner = {"conv_in.wait": torch.ones(1)}
    with pytest.raises(ConfigurationError, match="which is not trained"):
        engine.begin()
    engine.preconditioner = {"conv_in.bias": torch.ones(3)}
    with pytest.raises(ConfigurationError, match=r"conv_in.bias has shape \(3,\); expected \(16,\)"):
        engine.begin()


def test_the_layer_that_broke_the_backward_is_named() -> None:
    model, loss, batch = unet()
    engine = PerSampleGradients(model, projection_dim=0, weight_gradients=False)
    with engine:
        loss(model, batch).mean().backward()
    assert engine.first_nonfinite is None

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[2] = float("nan")
        return gradient

    handle = model.mid_block.register_forward_hook(lambda *call: call[2].register_hook(poison) and None)
    with engine:
        loss(model, batch).mean().backward()
    handle.remove()
    assert engine.norms.isfinite().tolist() == [True, True, False, True]
    assert engine.first_nonfinite is not None
    assert engine.first_nonfinite.startswith("mid_block")
