"""LoRA, LoHa and LoKr: peft's configuration of an adapter, from the shapes of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Size, nn

from diffhook.errors import ConfigurationError

Shapes = Mapping[str, Size]
"""Part → its shape, of one layer."""


@dataclass(frozen=True)
class AdapterKind:
    """A kind of adapter that peft has.

    Attributes:
        mark: what the names of its parts begin with.
        alpha: what its configuration calls α.
        rank: of a layer.
        fields: of the configuration besides, given all layers' shapes and those of the layers' weights.
    """

    mark: str
    alpha: str
    rank: Callable[[Shapes], int]
    fields: Callable[[Mapping[str, Shapes], Mapping[str, Size]], dict[str, Any]]


def _loha_rank(shapes: Shapes) -> int:
    return shapes["hada_w1_b"][0]


def _lokr_rank(shapes: Shapes) -> int:
    """Of a layer whose factors are whole, large enough for peft to leave them whole."""
    for name in ("lokr_t2", "lokr_w1_b", "lokr_w2_b"):
        if name in shapes:
            return shapes[name][0]
    return max(max(shapes[name][:2]) for name in ("lokr_w1", "lokr_w2"))


def _lora_fields(layers: Mapping[str, Shapes], weights: Mapping[str, Size]) -> dict[str, Any]:
    return {"use_dora": True} if any("lora_magnitude_vector" in s for s in layers.values()) else {}


def _loha_fields(layers: Mapping[str, Shapes], weights: Mapping[str, Size]) -> dict[str, Any]:
    """None: Tucker's is refused. peft 0.21 takes its first factors' gradients from the other half's chain."""
    tucker = next((layer for layer, shapes in layers.items() if "hada_t1" in shapes), None)
    if tucker is not None:
        raise ConfigurationError(
            f"a LoHa has Tucker factors (hada_t1 of {tucker}), whose gradients peft computes wrongly; LoHa "
            "without them can be rebuilt"
        )
    return {}


def _lokr_fields(layers: Mapping[str, Shapes], weights: Mapping[str, Size]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if any("lokr_t2" in shapes for shapes in layers.values()):
        found["use_effective_conv2d"] = True
    if any("lokr_w1_a" in shapes for shapes in layers.values()):
        found["decompose_both"] = True
    factor = _factor({layer: _first_factor(shapes) for layer, shapes in layers.items()}, weights)
    return found if factor == -1 else {**found, "decompose_factor": factor}


def _first_factor(shapes: Shapes) -> tuple[int, int]:
    if "lokr_w1" in shapes:
        return shapes["lokr_w1"][0], shapes["lokr_w1"][1]
    return shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1]


def _factor(first: Mapping[str, tuple[int, int]], weights: Mapping[str, Size]) -> int:
    """The number near which LoKr splits all of the layers' sides; −1: near their square roots."""
    from peft.tuners.lokr.layer import factorization

    sides = {
        (weights[layer][axis], size) for layer, sizes in first.items() for axis, size in enumerate(sizes)
    }
    for factor in (-1, *sorted({size for _, size in sides}, reverse=True)):
        if all(factorization(side, factor)[0] == size for side, size in sides):
            return factor
    layer = next(iter(first))
    raise ConfigurationError(
        f"a LoKr splits the {weights[layer][0]} × {weights[layer][1]} weight of {layer} by a factor of "
        f"{first[layer][0]} × {first[layer][1]}; peft has no number that splits all of the layers so"
    )


KINDS = {
    "LORA": AdapterKind("lora_", "lora_alpha", lambda shapes: shapes["lora_A"][0], _lora_fields),
    "LOHA": AdapterKind("hada_", "alpha", _loha_rank, _loha_fields),
    "LOKR": AdapterKind("lokr_", "alpha", _lokr_rank, _lokr_fields),
}


def describe(
    layers: Mapping[str, Shapes],
    model: nn.Module,
    alphas: Mapping[str, float],
    default: float | None,
    where: str,
) -> dict[str, Any]:
    """The configuration of the adapter with these parts, as
    :func:`~diffhook.capture.model.adapter.describe_adapters` gives it.

    Args:
        layers: layer → its parts' shapes.
        model: that the layers are of.
        alphas: layer → α.
        default: α of other layers; None: the rank.
        where: the parts come from, for errors.

    Raises:
        ConfigurationError: several kinds, or none that peft can make.
    """
    name = _kind(layers, where)
    kind = KINDS[name]
    weights = {layer: _weight(model, layer) for layer in layers}
    try:
        fields = kind.fields(layers, weights)
        ranks = {layer: kind.rank(shapes) for layer, shapes in layers.items()}
    except KeyError as error:
        raise ConfigurationError(
            f"{where} has layers without {error.args[0]!r}: parts are missing"
        ) from error
    own = {
        layer: float(rank) if _is_whole(layers[layer]) else _alpha(layer, rank, alphas, default)
        for layer, rank in ranks.items()
    }
    rank, usual = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, own))
    described: dict[str, Any] = {
        "peft_type": name,
        "r": rank,
        kind.alpha: usual,
        "target_modules": sorted(layers),
        "rank_pattern": {layer: other for layer, other in ranks.items() if other != rank},
        "alpha_pattern": {layer: other for layer, other in own.items() if other != usual},
        **fields,
    }
    return {key: value for key, value in described.items() if value != {}}


def _kind(layers: Mapping[str, Shapes], where: str) -> str:
    parts = [part for shapes in layers.values() for part in shapes]
    found = [name for name, kind in KINDS.items() if any(part.startswith(kind.mark) for part in parts)]
    if len(found) != 1:
        raise ConfigurationError(
            f"{where} holds {' and '.join(found) or 'no adapter'}; expected one of {', '.join(KINDS)}"
        )
    return found[0]


def _weight(model: nn.Module, layer: str) -> Size:
    module = model.get_submodule(layer)
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return Size() if weight is None else weight.shape


def _alpha(layer: str, rank: int, alphas: Mapping[str, float], default: float | None) -> float:
    return alphas.get(layer, float(rank) if default is None else default)


def _is_whole(shapes: Shapes) -> bool:
    """Of a LoKr whose factors are both whole: it is not scaled, whatever α says."""
    return {"lokr_w1", "lokr_w2"} <= shapes.keys()
