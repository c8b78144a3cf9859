"""The contract of a layer rule, and the table of rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from diffhook.contract import check_answers
from diffhook.errors import ConfigurationError
from diffhook.gradients.rules.call import Call, M, Product


class LayerRule(ABC, Generic[M]):
    """Per-sample parameter gradients of one kind of layer, from its input and output gradient.

    A rule is stateless, and says itself whatever anyone needs to know of its layers. ``modules``,
    ``parameters`` and the three abstract methods have no default: :func:`register` refuses a rule that
    leaves one out. :mod:`diffhook.gradients.rules.testing` has the tests that a rule must pass.

    The layer takes one tensor. Its parameters enter as they are, in the operation that makes its output: what
    becomes of a parameter before or after is not believed to be the layer's own, and goes to the fallback.

    Attributes:
        modules: the classes of layers that it is for. A subclass counts, unless it replaces ``methods``.
        parameters: the layer's own parameters that the rule explains, by attribute. Others, such as the
            ``weight_orig`` of a pruned layer, go to the fallback.
        methods: of the layer, that together compute its output: where one is replaced, by a subclass or on
            the instance, the function is another, and so is its gradient.
        without_input: those of ``parameters`` whose gradients do not depend on the layer's input, which is
            not kept where no other is trained.
        gives_factors: whether gradients of matrices may come as :class:`Factors`.
        takes_half: whether ``products`` takes gradients of half precision, and gives float32 all the same.
        rounded: whether torch's CPU kernel adds up the parameters' gradients in half precision.
    """

    modules: ClassVar[tuple[type[nn.Module], ...]]
    parameters: ClassVar[tuple[str, ...]]
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    without_input: ClassVar[tuple[str, ...]] = ()
    gives_factors: ClassVar[bool] = False
    takes_half: ClassVar[bool] = False
    rounded: ClassVar[bool] = False

    @abstractmethod
    def samples_first(self, module: M, inputs: Tensor) -> bool:
        """Whether row b of input and output belongs to sample b in such a call, given that the first axis of
        the output is as long as the batch: false for an unbatched image of as many channels."""

    @abstractmethod
    def mixes_channels(self, module: M) -> bool:
        """Whether :meth:`products` can mix channels: whether the ``weight`` gradient of shape
        (O, I, *kernel) is bilinear in one map of O channels and one of I."""

    @abstractmethod
    def products(self, call: Call[M]) -> Iterator[tuple[str, Product]]:
        """Yield (parameter name, (B, *parameter.shape) gradients) for the wanted names."""

    def workspace(self, call: Call[M]) -> int:
        """Numbers per sample that :meth:`products` holds at once; the batch is cut accordingly."""
        sizes = [p.numel() for p in call.module.parameters(recurse=False)]
        return max(call.inputs[0].numel(), call.grad_output[0].numel(), *sizes)

    def join(self, calls: Sequence[Call[M]]) -> Call[M]:
        """One call whose parameter gradients are the sums over ``calls``. A rule that has it is asked once
        for a layer that is called several times."""
        raise NotImplementedError

    @property
    def joins(self) -> bool:
        """Whether the rule has :meth:`join`."""
        return type(self).join is not LayerRule.join

    def obstacle(self, module: M) -> str | None:
        """Why this module has no per-sample gradient under this rule; None if it has one."""
        return None

    def is_replaced(self, module: nn.Module) -> bool:
        """Whether someone has set another forward on this instance."""
        return not vars(module).keys().isdisjoint(self.methods)


R = TypeVar("R", bound=LayerRule[Any])

_QUESTIONS = {
    "modules": "modules, a tuple of the layer classes that it is for",
    "parameters": "parameters, a tuple of the names of the layer's parameters whose gradients it gives",
    "samples_first": "samples_first(module, inputs), which says whether row b of such a call is sample b",
    "mixes_channels": "mixes_channels(module), which says whether products may mix the channels of a weight",
    "products": "products(call), which yields each parameter's name and per-sample gradients",
}

_rules: dict[type[nn.Module], LayerRule[Any]] = {}
_methods: dict[type[nn.Module], dict[str, Any]] = {}  # as they were when the rule was registered


def register(rule: type[R]) -> type[R]:
    """Class decorator: use this rule for its layers, in place of any other, in engines made from now on.

    Raises:
        ConfigurationError: the rule leaves out an answer that the engine needs, or gives one of another kind.
    """
    _check_answers(rule)
    for kind in rule.modules:
        _rules[kind] = rule()
        _methods[kind] = {name: getattr(kind, name, None) for name in rule.methods}
    return rule


def _check_answers(rule: type[LayerRule[Any]]) -> None:
    check_answers(rule, LayerRule, "layer rule", _QUESTIONS)
    for name in _QUESTIONS:
        answer = getattr(rule, name)
        expected = callable(answer) if callable(getattr(LayerRule, name, None)) else isinstance(answer, tuple)
        if not expected:
            raise ConfigurationError(f"{rule.__name__}.{name} is {answer!r}; expected {_QUESTIONS[name]}")


def rule_for(module: nn.Module) -> LayerRule[Any] | None:
    """The rule for this module, or None where its class or the instance replaces the forward."""
    kind = next((kind for kind in type(module).__mro__ if kind in _rules), None)
    if kind is None or type(module).__call__ is not nn.Module.__call__:
        return None
    kept = all(getattr(type(module), name, None) is method for name, method in _methods[kind].items())
    return _rules[kind] if kept and not _rules[kind].is_replaced(module) else None
