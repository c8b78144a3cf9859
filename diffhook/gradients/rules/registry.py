"""The contract of a layer rule, and the table of rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Mixers(NamedTuple):
    """Random reductions of a convolution's channels, entries ±1/√q: E[R Rᵀ] = 1."""

    inward: Tensor  # (I, q)
    outward: Tensor  # (O, q)


class Reduced(NamedTuple):
    """What is needed of a gradient product that was never formed."""

    squares: Tensor  # (B, k) squared L2 norms of k parts
    mixed: Tensor | None  # (B, q·q·kernel), the product of the mixed factors


class Factors(NamedTuple):
    """The gradient Σ_t grads[:, t] ⊗ inputs[:, t] of a matrix; not formed."""

    grads: Tensor  # (B, T, O)
    inputs: Tensor  # (B, T, I)


Product = Tensor | Reduced | Factors


class LayerRule(ABC):
    """Per-sample parameter gradients of one kind of layer, from its input and output gradient.

    A rule is stateless. Sample b is row b of the leading axis of input and output alike.

    Attributes:
        parameters: the module's own parameters that the rule explains, by attribute. Others, such as
            the ``weight_orig`` of a pruned layer, go to the fallback.
        joins: whether :meth:`join` can make one call of several.
        rounded: whether torch's CPU kernel adds up the parameters' gradients in half precision.
        gives_factors: whether weight gradients come as :class:`Factors`.
    """

    parameters: tuple[str, ...] = ("weight", "bias")
    joins = False
    gives_factors = False
    rounded = False

    def join(self, calls: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """One (inputs, grad_output) whose parameter gradients are the sums over ``calls``."""
        raise NotImplementedError

    @abstractmethod
    def products(
        self,
        module: nn.Module,
        inputs: Tensor,
        grad_output: Tensor,
        wanted: Collection[str],
        mixers: Mapping[str, Mixers | None],
    ) -> Iterator[tuple[str, Product]]:
        """Yield (parameter name, (B, *parameter.shape) gradients) for the ``wanted`` names.

        Args:
            module: the layer.
            inputs: its input, (B, …), detached; any strides.
            grad_output: ∂loss/∂output, (B, …), in the dtype to compute in; any strides.
            wanted: names among the module's own parameters that are trainable.
            mixers: names for which :class:`Reduced` will do, with the reductions to use, or None
                where only the norm, or factors, are asked for. Most rules form the product all the same.
        """

    def workspace(
        self, module: nn.Module, inputs: Tensor, grad_output: Tensor, mixers: Mapping[str, Mixers | None]
    ) -> int:
        """Numbers per sample that :meth:`products` holds at once; the batch is cut accordingly."""
        sizes = [parameter.numel() for parameter in module._parameters.values() if parameter is not None]
        return max(inputs[0].numel(), grad_output[0].numel(), *sizes)

    def obstacle(self, module: nn.Module) -> str | None:
        """Why this module has no per-sample gradient under this rule; None if it has one."""
        return None


FORWARD_METHODS = ("forward", "_conv_forward")
"""What a rule is a rule for: another forward is another function, with another gradient."""

_rules: dict[type[nn.Module], LayerRule] = {}
_methods: dict[type[nn.Module], dict[str, Any]] = {}  # as they were when the rule was registered


def register(*kinds: type[nn.Module]) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Class decorator: use this rule for these module classes."""

    def add(rule: type[LayerRule]) -> type[LayerRule]:
        for kind in kinds:
            _rules[kind] = rule()
            _methods[kind] = {name: getattr(kind, name, None) for name in FORWARD_METHODS}
        return rule

    return add


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule for this module, or None where its class or the instance replaces the forward."""
    kind = next((kind for kind in type(module).__mro__ if kind in _rules), None)
    if kind is None or type(module).__call__ is not nn.Module.__call__:
        return None
    kept = all(getattr(type(module), name, None) is method for name, method in _methods[kind].items())
    return _rules[kind] if kept and not replaces_forward(module) else None


def replaces_forward(module: nn.Module) -> bool:
    """Whether someone has set another forward on this instance."""
    own = vars(module)
    return any(name in own for name in FORWARD_METHODS)
