"""The weight gradient of a convolution: in which of several ways, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from diffhook.gradients.norms import piece_norms
from diffhook.gradients.products import bmm, is_half, widened
from diffhook.gradients.rules.call import Mixers, Product, Reduced
from diffhook.gradients.rules.conv_products import WAYS, Maps, Way
from diffhook.gradients.rules.ghost import ghost_applies, ghost_size, ghost_squares
from diffhook.gradients.tuning import tuner


def product(maps: Maps, mixers: Mapping[str, Mixers | None]) -> Product:
    """What is asked for of the ``weight``: (B, O, I/groups, *kernel), or its norms and mixed channels."""
    return _reduced(maps, mixers["weight"]) if "weight" in mixers else _formed(maps)


def workspace(maps: Maps, mixers: Mapping[str, Mixers | None], size: int) -> int:
    """Numbers per sample that :func:`product` holds at once, beside a formed gradient's ``size``."""
    if "weight" in mixers and _norm_way(maps) == "ghost":
        return max(maps.inputs[0].numel(), maps.grad[0].numel(), ghost_size(maps.inputs, maps.grad))
    return max(size, WAYS[_fastest("product", maps, _ways(maps))].size(*maps))


def _formed(maps: Maps) -> Tensor:
    """(B, O, I/groups, *kernel) weight gradients of each sample, by the fastest way."""
    ways = _ways(maps)
    return ways[_fastest("product", maps, ways)]()


def _reduced(maps: Maps, mixers: Mixers | None) -> Reduced:
    """Norms by the faster way, and the product of the mixed channels."""
    squared = _norm_way(maps) == "ghost"
    norms = ghost_squares(*maps) if squared else _product_norms(maps)
    if mixers is None:
        return Reduced(norms, squared, None)
    inputs, grad = _mix(maps.inputs, mixers.inward), _mix(maps.grad, mixers.outward)
    mixed = _formed(Maps(inputs, grad, maps.geometry)).flatten(1)
    return Reduced(norms, squared, mixed if mixers.scale == 1 else mixed.mul_(mixers.scale))


def _mix(values: Tensor, mixer: Tensor) -> Tensor:
    """(B, C, *space) → (B, q, *space)."""
    flat = values.flatten(2)
    flat = bmm(mixer.t().expand(len(values), -1, -1), flat) if is_half(flat) else mixer.t() @ flat
    return flat.view(len(values), -1, *values.shape[2:])


def _product_norms(maps: Maps) -> Tensor:
    what = "rounded product" if is_half(maps.grad) else "product"
    ways = {name: partial(way, *maps) for name, way in WAYS.items()}
    return piece_norms(ways[_fastest(what, maps, ways)]().flatten(1))


# ── the choice ────────────────────────────────────────────────────────────────────────────────────


def _key(what: str, maps: Maps) -> str:
    """Without the batch: a ragged one is treated like the others."""
    inputs, grad, geometry = maps
    return f"{what} {tuple(inputs.shape[1:])} {tuple(grad.shape[1:])} {geometry} {grad.dtype}"


def _fastest(what: str, maps: Maps, ways: Mapping[str, Callable[[], Tensor]]) -> str:
    return tuner(maps.grad.device).fastest(_key(what, maps), ways)


def _ways(maps: Maps) -> dict[str, Callable[[], Tensor]]:
    """To a product that is not rounded to half precision: what would round it gets its maps in float32."""
    ways: dict[str, Callable[[], Tensor]] = {n: partial(_of_widened, way, maps) for n, way in WAYS.items()}
    ways["columns"] = partial(WAYS["columns"], *maps)
    return ways


def _of_widened(way: Way, maps: Maps) -> Tensor:
    return way(widened(maps.inputs), widened(maps.grad), maps.geometry)


def _norm_way(maps: Maps) -> str:
    if not ghost_applies(*maps):
        return "product"
    ways = {"ghost": partial(ghost_squares, *maps), "product": partial(_product_norms, maps)}
    return _fastest("norm", maps, ways)
