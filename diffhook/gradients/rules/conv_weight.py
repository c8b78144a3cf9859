"""The weight gradient of a convolution: in which of several ways, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from diffhook.gradients.norms import piece_norms
from diffhook.gradients.rules.call import Mixers, Product, Reduced
from diffhook.gradients.rules.conv_products import WAYS, Maps
from diffhook.gradients.rules.ghost import ghost_applies, ghost_size, ghost_squares
from diffhook.gradients.tuning import tuner

_TIMED = 1 << 20  # numbers that a way is timed on


def product(maps: Maps, mixers: Mapping[str, Mixers | None]) -> Product:
    """What is asked for of the ``weight``: (B, O, I/groups, *kernel), or its norms and mixed channels."""
    return _reduced(maps, mixers["weight"]) if "weight" in mixers else _formed(maps)


def sample(size: int) -> slice:
    """Rows enough to measure on, of so many numbers each."""
    return slice(0, max(_TIMED // size, 1))


def workspace(maps: Maps, mixers: Mapping[str, Mixers | None], size: int) -> int:
    """Numbers per sample that :func:`product` holds at once, beside a formed gradient's ``size``."""
    if "weight" in mixers and _norm_way(maps) == "ghost":
        return max(maps.inputs[0].numel(), maps.grad[0].numel(), ghost_size(maps.inputs, maps.grad))
    return max(size, WAYS[_product_way(maps)].size(*maps))


def _formed(maps: Maps) -> Tensor:
    """(B, O, I/groups, *kernel) weight gradients of each sample, by the fastest way."""
    return WAYS[_product_way(maps)](*maps)


def _reduced(maps: Maps, mixers: Mixers | None) -> Reduced:
    """Norms by the faster way, and the product of the mixed channels."""
    squares = ghost_squares(*maps) if _norm_way(maps) == "ghost" else _product_squares(maps)
    if mixers is None:
        return Reduced(squares, None)
    inputs, grad = _mix(maps.inputs, mixers.inward), _mix(maps.grad, mixers.outward)
    return Reduced(squares, _formed(Maps(inputs, grad, maps.geometry)).flatten(1))


def _mix(values: Tensor, mixer: Tensor) -> Tensor:
    """(B, C, *space) → (B, q, *space)."""
    flat = mixer.t() @ values.flatten(2)
    return flat.view(len(values), -1, *values.shape[2:])


def _product_squares(maps: Maps) -> Tensor:
    return piece_norms(_formed(maps).flatten(1)).square()


# ── the choice ────────────────────────────────────────────────────────────────────────────────────


def _key(what: str, maps: Maps) -> str:
    """Without the batch: a ragged one is treated like the others."""
    inputs, grad, geometry = maps
    return f"{what} {tuple(inputs.shape[1:])} {tuple(grad.shape[1:])} {geometry} {grad.dtype}"


def _product_way(maps: Maps) -> str:
    ways = {name: partial(way, *maps) for name, way in WAYS.items()}
    return tuner(maps.grad.device).fastest(_key("product", maps), ways)


def _norm_way(maps: Maps) -> str:
    if not ghost_applies(*maps):
        return "product"
    ways = {"ghost": partial(ghost_squares, *maps), "product": partial(_product_squares, maps)}
    return tuner(maps.grad.device).fastest(_key("norm", maps), ways)
