"""Layer rules, one file for each kind of layer. A file is registered by its line in the first list."""

from diffhook.gradients.rules import (  # noqa: F401 - the list of rules
    conv,
    conv_transpose,
    embedding,
    linear,
    normalization,
)
from diffhook.gradients.rules.call import Call, Factors, Mixers, Product, Reduced
from diffhook.gradients.rules.registry import LayerRule, register, rule_for

__all__ = [
    "Call",
    "Factors",
    "LayerRule",
    "Mixers",
    "Product",
    "Reduced",
    "register",
    "rule_for",
]
