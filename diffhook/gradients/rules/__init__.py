"""One file per kind of layer. Importing this package registers them all."""

from diffhook.gradients.rules import conv, embedding, linear, normalization
from diffhook.gradients.rules.registry import LayerRule, register, rule_for

__all__ = [
    "LayerRule",
    "conv",
    "embedding",
    "linear",
    "normalization",
    "register",
    "rule_for",
]
