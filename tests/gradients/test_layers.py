"""Each layer rule against batch-size-1 autograd, over generated problems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffhook.gradients import PerSampleGradients
from tests.twins import projected, relative_error, sample_gradients


def _squares(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    # Nonlinear in the output, so that every output element has a gradient of its own.
    return model(batch[0]).tanh().square().flatten(1).sum(1)


LINEAR = {
    f"linear-{'x'.join(map(str, shape)) or 'flat'}-bias={bias}": (
        nn.Linear(5, 3, bias=bias),
        (4, *shape, 5),
    )
    for shape in ((), (7,), (2, 3))
    for bias in (True, False)
}
CONV = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (3, 4, 9)),
    "conv1d-same-dilated": (nn.Conv1d(4, 6, 4, padding="same", dilation=2), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 8, 8)),
    "conv2d-nobias": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (3, 4, 8, 8)),
    "conv2d-1x1": (nn.Conv2d(4, 6, 1), (3, 4, 8, 8)),
    "conv2d-stride": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 9, 8)),
    "conv2d-uneven-stride": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(0, 1)), (3, 4, 9, 8)),
    "conv2d-valid": (nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 8, 8)),
    "conv2d-same-even-kernel": (nn.Conv2d(4, 6, 4, padding="same"), (3, 4, 8, 8)),
    "conv2d-dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (3, 4, 8, 8)),
    "conv2d-groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 8, 8)),
    "conv2d-depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 8, 8)),
    "conv2d-reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 8, 8)),
    "conv2d-circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 8, 8)),
    "conv3d": (nn.Conv3d(2, 4, 3, padding=1, stride=(1, 2, 1)), (3, 2, 4, 5, 6)),
    "conv3d-same": (nn.Conv3d(2, 4, (1, 3, 2), padding="same"), (3, 2, 4, 5, 6)),
}
NORM = {
    "groupnorm": (nn.GroupNorm(2, 6), (3, 6, 5, 5)),
    "groupnorm-flat": (nn.GroupNorm(2, 6), (3, 6)),
    "groupnorm-tokens": (nn.GroupNorm(3, 6), (3, 6, 7)),
    "layernorm": (nn.LayerNorm(6), (3, 7, 6)),
    "layernorm-flat": (nn.LayerNorm(6), (3, 6)),
    "layernorm-two-axes": (nn.LayerNorm((5, 6)), (3, 2, 5, 6)),
    "layernorm-nobias": (nn.LayerNorm(6, bias=False), (3, 7, 6)),
    "rmsnorm": (nn.RMSNorm(6), (3, 7, 6)),
    "rmsnorm-eps": (nn.RMSNorm(6, eps=0.1), (3, 7, 6)),
}
LAYERS = {**LINEAR, **CONV, **NORM}


def _check(model: nn.Module, batch: tuple[Tensor], **options: object) -> None:
    engine = PerSampleGradients(model, projection_dim="full", **options)  # type: ignore[arg-type]
    expected = sample_gradients(model, _squares, batch)
    for _ in range(2):  # the first is checked
        with engine:
            _squares(model, batch).mean().backward()
        assert engine.coverage.complete
        assert relative_error(engine.projections, expected) < 1e-5
        assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_the_batch_1_loop(name: str, weight_gradients: bool) -> None:
    torch.manual_seed(1)
    layer, shape = LAYERS[name]
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    _check(layer, (torch.randn(shape),), weight_gradients=weight_gradients)


# Not GroupNorm alone: torch 2.13's own backward of it crashes on channels_last inputs that need no
# gradient. Whole channels_last models, GroupNorm included, are in test_models.
IMAGES = [n for n, (_, shape) in LAYERS.items() if len(shape) == 4 and n != "groupnorm"]


@pytest.mark.parametrize("name", IMAGES)
def test_memory_format_does_not_matter(name: str) -> None:
    layer, shape = LAYERS[name]
    last = torch.randn(shape).to(memory_format=torch.channels_last)
    swapped = torch.randn(*shape[:2], shape[3], shape[2]).transpose(2, 3)
    for inputs in (last, swapped):
        _check(layer, (inputs,))


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(4,), (4, 9)])
def test_an_embedding_adds_up_repeated_rows(shape: tuple[int, ...], padding_idx: int | None) -> None:
    torch.manual_seed(1)
    _check(nn.Embedding(6, 5, padding_idx=padding_idx), (torch.randint(0, 6, shape),))


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Linear(8, 9)])
def test_a_chunked_layer_equals_the_batch_1_loop(layer: nn.Module) -> None:
    _check(layer, (torch.randn(5, 4, 8, 8),), workspace=400)


WIDE = {
    "ghost": (nn.Conv2d(128, 160, 3, padding=1), (3, 128, 6, 7)),
    "ghost-unpadded": (nn.Conv2d(128, 128, 3), (3, 128, 8, 8)),
    "ghost-1d": (nn.Conv1d(128, 128, 5, padding=2), (3, 128, 20)),
    "ghost-3d": (nn.Conv3d(128, 128, 2, padding=1), (2, 128, 2, 3, 2)),
    "stride": (nn.Conv2d(128, 128, (3, 2), padding=(1, 0), stride=2), (3, 128, 8, 8)),
    "large-map": (nn.Conv2d(128, 128, 3, padding=1), (2, 128, 24, 24)),
}


@pytest.mark.parametrize("dim", [0, 2048])
@pytest.mark.parametrize("name", WIDE)
def test_a_wide_convolution_needs_no_product(name: str, dim: int) -> None:
    torch.manual_seed(1)
    layer, shape = WIDE[name]
    batch = (torch.randn(shape),)
    expected = sample_gradients(layer, _squares, batch)
    engine = PerSampleGradients(layer, projection_dim=dim)
    for _ in range(2):  # the first is checked, for which products are formed
        with engine:
            _squares(layer, batch).mean().backward()
    assert relative_error(engine.norms[:, None], expected.norm(dim=1, keepdim=True)) < 1e-5
    if dim:
        assert relative_error(engine.projections, projected(engine.sketch, layer, expected)) < 1e-5


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(5, 3)
    layer.weight.requires_grad_(False)
    engine = PerSampleGradients(layer, projection_dim="full")
    batch = (torch.randn(4, 5),)
    with engine:
        _squares(layer, batch).mean().backward()
    assert engine.projections.shape == (4, 3)
    assert relative_error(engine.projections, sample_gradients(layer, _squares, batch)) < 1e-5


def test_a_subclass_with_its_own_forward_does_not_use_the_parents_rule() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = Doubled(5, 3)
    _check(model, (torch.randn(4, 5),))
    engine = PerSampleGradients(model)
    assert engine.coverage.fallback == ("weight", "bias")
