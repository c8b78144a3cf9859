"""Half-precision factors whose products add up in float32, where the device can: here in its place, a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from diffhook.gradients import PerSampleGradients, products
from diffhook.gradients.tuning import Tuner
from tests.twins import relative_error, sample_gradients

MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "matrix": (nn.Linear(300, 280), torch.randn(3, 5, 300)),
    "matrix-of-many-tokens": (nn.Linear(256, 256), torch.randn(3, 300, 256)),
    "matrix-of-one-token": (nn.Linear(300, 280), torch.randn(3, 300)),
    "outer": (nn.Linear(64, 512), torch.randn(3, 1, 64)),
    "narrow-matrix": (nn.Linear(40, 24), torch.randn(3, 5, 40)),
    "table": (nn.Embedding(300, 260, padding_idx=7), torch.tensor([[1, 7, 1], [2, 5, 299], [7, 3, 7]])),
    "pixels": (nn.Conv2d(16, 12, 1), torch.randn(3, 16, 6, 6)),
    "group-norm": (nn.GroupNorm(4, 16), torch.randn(3, 16, 6, 6)),
    "layer-norm": (nn.LayerNorm(48), torch.randn(3, 5, 48)),
    "rms-norm": (nn.RMSNorm(48), torch.randn(3, 5, 48)),
}
CONVOLUTIONS: dict[str, tuple[nn.Module, Tensor]] = {
    "narrow": (nn.Conv2d(8, 12, 3, padding=1), torch.randn(3, 8, 6, 6)),
    "transposed": (nn.ConvTranspose2d(8, 12, 3, stride=2), torch.randn(3, 8, 5, 5)),
    "wide": (nn.Conv2d(128, 160, 3, padding=1), torch.randn(3, 128, 6, 6)),
}


def _losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).float().tanh().square().flatten(1).sum(1)


def _measured(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Norms and projections of the second pass: the first is checked."""
    engine = PerSampleGradients(model, projection_dim=300)
    for _ in range(2):
        model.zero_grad()
        with engine:
            _losses(model, batch).mean().backward()
    assert engine.coverage.complete
    assert not engine.coverage.fallback
    return engine.norms, engine.projections


class _TensorCores:
    """What a CPU has no kernel for, by conversion; counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._plain = torch.bmm
        monkeypatch.setattr(products, "_adds_up_in_float32", lambda device, dtype: True)
        monkeypatch.setattr(torch, "bmm", self._bmm)

    def _bmm(
        self, left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None, **rest: Tensor
    ) -> Tensor:
        if out_dtype is None:
            return self._plain(left, right, **rest)
        assert left.dtype == right.dtype == torch.bfloat16
        self.calls += 1
        return self._plain(left.to(out_dtype), right.to(out_dtype))


def _halved(problem: tuple[nn.Module, Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, batch = problem
    return copy.deepcopy(layer).bfloat16(), batch.bfloat16() if batch.is_floating_point() else batch


@pytest.mark.parametrize("name", MODELS)
def test_they_are_the_numbers_that_conversion_before_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = _halved(MODELS[name])
    norms, projections = _measured(model, batch)
    cores = _TensorCores(monkeypatch)
    half_norms, half_projections = _measured(model, batch)
    assert cores.calls or "norm" in name or name in ("pixels", "narrow-matrix") or name == "outer"
    torch.testing.assert_close(half_norms, norms, rtol=1e-5, atol=0)
    assert relative_error(half_projections, projections) < 1e-5


@pytest.mark.parametrize("way", ["grouped", "looped", "columns", "ghost"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_so_are_convolutions(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of wide ones may come from products that are rounded, of so many numbers that it hardly shows."""
    model, batch = _halved(CONVOLUTIONS[name])
    monkeypatch.setattr(Tuner, "fastest", lambda self, key, ways: way if way in ways else next(iter(ways)))
    norms, projections = _measured(model, batch)
    _TensorCores(monkeypatch)
    half_norms, half_projections = _measured(model, batch)
    torch.testing.assert_close(half_norms, norms, rtol=1e-5, atol=0)
    assert relative_error(half_projections, projections) < 1e-5


def test_the_twin_is_as_near_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is the network's own rounding."""
    torch.manual_seed(0)
    parts = [nn.Linear(300, 280), nn.LayerNorm(280), nn.SiLU(), nn.Linear(280, 256)]
    model, batch = nn.Sequential(*parts).bfloat16(), torch.randn(4, 6, 300).bfloat16()
    exact = sample_gradients(model, _losses, batch).norm(dim=1)
    before = (_measured(model, batch)[0].double() / exact - 1).abs().max()
    _TensorCores(monkeypatch)
    after = (_measured(model, batch)[0].double() / exact - 1).abs().max()
    assert after < 1.1 * before + 1e-5
    assert after < 0.01


def test_a_device_is_tried_and_not_believed() -> None:
    cpu = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert not products.may_stay_half(cpu)
    assert not products.may_stay_half(cpu.float())
    assert products.bmm(cpu[None], cpu[None]).dtype == torch.float32
    assert products.mm(cpu.double(), cpu.double()).dtype == torch.float64
