"""One file per kind of layer. Importing this package registers them all."""

from diffhook.gradients.rules import conv, embedding, linear, normalization
from diffhook.gradients.rules.registry import (
    LayerRule,
    Mixers,
    Outer,
    Product,
    Reduced,
    register,
    replaces_forward,
    rule_for,
)

__all__ = [
    "LayerRule",
    "Mixers",
    "Outer",
    "Product",
    "Reduced",
    "conv",
    "embedding",
    "linear",
    "normalization",
    "register",
    "replaces_forward",
    "rule_for",
]
