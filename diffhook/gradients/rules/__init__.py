"""One file per kind of layer. Importing this package registers them all."""

from diffhook.gradients.rules import conv, embedding, factors, linear, normalization
from diffhook.gradients.rules.registry import (
    Factors,
    LayerRule,
    Mixers,
    Product,
    Reduced,
    register,
    replaces_forward,
    rule_for,
)

__all__ = [
    "Factors",
    "LayerRule",
    "Mixers",
    "Product",
    "Reduced",
    "conv",
    "embedding",
    "factors",
    "linear",
    "normalization",
    "register",
    "replaces_forward",
    "rule_for",
]
