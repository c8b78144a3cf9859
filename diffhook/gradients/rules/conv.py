"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.gradients.norms import piece_norms
from diffhook.gradients.rules.conv_products import WAYS, Geometry
from diffhook.gradients.rules.ghost import ghost_applies, ghost_size, ghost_squares
from diffhook.gradients.rules.registry import LayerRule, Mixers, Product, Reduced, register
from diffhook.gradients.tuning import tuner

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_TIMED = 1 << 20  # numbers that a way is timed on


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule):
    def products(
        self,
        module: nn.Module,
        inputs: Tensor,
        grad_output: Tensor,
        wanted: Collection[str],
        mixers: Mapping[str, Mixers | None],
    ) -> Iterator[tuple[str, Product]]:
        assert isinstance(module, _Conv)
        # Explicit contiguity: with channels_last strides the batch cannot be folded into groups.
        grad = grad_output.contiguous()
        if "weight" in wanted:
            padded, geometry = _padded(module, inputs.to(grad.dtype))
            padded = padded.contiguous()
            if "weight" in mixers:
                yield "weight", _reduced(padded, grad, geometry, mixers["weight"])
            else:
                yield "weight", weight_products(padded, grad, geometry)
        if "bias" in wanted:
            yield "bias", grad.flatten(2).sum(2)

    def workspace(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, mixers: Mapping[str, Mixers | None]
    ) -> int:
        assert isinstance(module, _Conv)
        size = super().workspace(module, inputs, grad_output, mixers)
        few = slice(0, max(_TIMED // size, 1))
        padded, geometry = _padded(module, inputs[few].to(grad_output.dtype))
        maps = padded.contiguous(), grad_output[few].contiguous(), geometry
        if "weight" in mixers and _norm_way(*maps) == "ghost":
            return max(inputs[0].numel(), grad_output[0].numel(), ghost_size(*maps[:2]))
        return max(size, WAYS[_product_way(*maps)].size(*maps))


def _padded(module: _Conv, inputs: Tensor) -> tuple[Tensor, Geometry]:
    """Inputs and geometry with every kind of padding reduced to symmetric zeros."""
    padding = module.padding
    if module.padding_mode != "zeros" or padding == "same":
        amounts = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(inputs, amounts, mode=mode)
        padding = (0,) * len(module.kernel_size)
    elif padding == "valid":
        padding = (0,) * len(module.kernel_size)
    assert not isinstance(padding, str)
    geometry = Geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
    return inputs, geometry


def weight_products(inputs: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """(B, O, I/groups, *kernel) weight gradients of each sample, by the fastest way.

    Args:
        inputs: (B, I, *space), contiguous.
        grad: (B, O, *space'), contiguous.
    """
    return WAYS[_product_way(inputs, grad, geometry)](inputs, grad, geometry)


def _reduced(inputs: Tensor, grad: Tensor, geometry: Geometry, mixers: Mixers | None) -> Reduced:
    """Norms by the faster way, and the product of the mixed channels."""
    if _norm_way(inputs, grad, geometry) == "ghost":
        squares = ghost_squares(inputs, grad, geometry)
    else:
        squares = _product_squares(inputs, grad, geometry)
    if mixers is None:
        return Reduced(squares, None)
    narrow_inputs = _mix(inputs, mixers.inward)
    narrow_grad = _mix(grad, mixers.outward)
    return Reduced(squares, weight_products(narrow_inputs, narrow_grad, geometry).flatten(1))


def _mix(maps: Tensor, mixer: Tensor) -> Tensor:
    """(B, C, *space) → (B, q, *space)."""
    flat = mixer.t() @ maps.flatten(2)
    return flat.view(len(maps), -1, *maps.shape[2:])


def _product_squares(inputs: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    return piece_norms(weight_products(inputs, grad, geometry).flatten(1)).square()


# ── the choice ────────────────────────────────────────────────────────────────────────────────────


def _key(what: str, inputs: Tensor, grad: Tensor, geometry: Geometry) -> str:
    """Without the batch: a ragged one is treated like the others."""
    return f"{what} {tuple(inputs.shape[1:])} {tuple(grad.shape[1:])} {geometry} {grad.dtype}"


def _product_way(inputs: Tensor, grad: Tensor, geometry: Geometry) -> str:
    key = _key("product", inputs, grad, geometry)
    ways = {name: partial(way, inputs, grad, geometry) for name, way in WAYS.items()}
    return tuner(grad.device).fastest(key, ways)


def _norm_way(inputs: Tensor, grad: Tensor, geometry: Geometry) -> str:
    if not ghost_applies(inputs, grad, geometry):
        return "product"
    key = _key("norm", inputs, grad, geometry)
    ways = {
        "ghost": partial(ghost_squares, inputs, grad, geometry),
        "product": partial(_product_squares, inputs, grad, geometry),
    }
    return tuner(grad.device).fastest(key, ways)
