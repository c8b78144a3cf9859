"""Which tensors of a forward have the samples of the batch in front, one row each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from diffhook.compat.torch import WeakIdKeyDictionary, is_custom, tree_leaves
from diffhook.gradients.separability import Place, SeparabilityCheck


def leading_axis(values: Iterable[Any]) -> int | None:
    """Length of the first axis of the first tensor that has one."""
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() > 0), None)


def _named(tensors: Iterable[Tensor], names: Mapping[int, str]) -> set[str]:
    return {names[id(tensor)] for tensor in tensors if id(tensor) in names}


class AxisLayout:
    """The operations of a forward whose results have something else than samples in front.

    Learned from shapes, and by the check of separability; it holds for later batches, where a first axis
    may be as long as the batch by chance. Once learned it stays: the fallback is exact either way.
    """

    def __init__(self, recomputed: Iterable[str] = ()) -> None:
        self._others: dict[Place, str] = {}
        #: tensors that no operation has shown, and the parameters directly behind them
        self.foreign: dict[Place, frozenset[str]] = {}
        #: parameters behind such tensors that are presumed to be their layers': a backward that computes a
        #: block again, as a checkpoint of a repository's own does, calls them where we see it
        self.recomputed = set(recomputed)

    def learn(self, place: Place, operation: str) -> None:
        self._others[place] = operation

    def knows(self, place: Place, operation: str) -> bool:
        return self._others.get(place) == operation


class SampleAxis:
    """Follows one forward and answers whether a tensor has samples in front.

    A first axis as long as the batch is believed unless the layout says otherwise; in a checked pass,
    separability is put to the test when the model has answered.

    Args:
        layout: of earlier passes; learns.
        check: tests separability; None in ordinary passes.

    Attributes:
        batch: number of samples B, once the model has been called.
    """

    def __init__(self, layout: AxisLayout, check: SeparabilityCheck | None) -> None:
        self.batch: int | None = None
        self._layout = layout
        self._check = check
        self._count = 0  # of operations
        self._left: set[str] = set()  # to their layers, by the checked pass
        self._met: set[Place] = set()  # where a tensor was that no operation has shown
        if check is not None:
            layout.foreign.clear()  # found anew
        self._shown = WeakIdKeyDictionary()  # what operations have made or been given
        self._otherwise = WeakIdKeyDictionary()  # tensors with something else in front

    def samples_first(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.batch and tensor not in self._otherwise

    def see(self, operation: str, inputs: Sequence[Tensor], output: Any) -> None:
        """The next operation of the forward has made ``output`` of ``inputs``."""
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors or operation == "detach":  # which the tape calls more or less often
            return
        self._count += 1
        if self._layout.foreign:
            self._shown.update(dict.fromkeys(tensors, True))
        for index, tensor in enumerate(tensors):
            if tensor.dim() > 0:
                self._see(Place(self._count, index), operation, inputs, tensor)

    def _see(self, place: Place, operation: str, inputs: Sequence[Tensor], tensor: Tensor) -> None:
        if tensor.shape[0] != self.batch:
            if self._check is not None:
                self._layout.learn(place, operation)
        elif self._layout.knows(place, operation):
            self._otherwise[tensor] = True
        if self._check is not None:
            self._check.note(place, operation, inputs, tensor, rows=self.samples_first(tensor))

    @property
    def seeks_foreign(self) -> bool:
        """Whether :meth:`behind` may find something."""
        return self._check is not None or bool(self._layout.foreign)

    def behind(
        self,
        index: int,
        tensor: Tensor,
        names: Mapping[int, str],
        explained: Collection[str],
        derived: Callable[[], set[Node]],
    ) -> frozenset[str]:
        """Parameters directly behind a tensor that no operation has shown, such as the result of a custom
        autograd function.

        Args:
            index: of the tensor among the inputs of the next operation.
            names: id of parameter → name, for those that may be found.
            explained: names that need not be found, unless by way of what is ``derived``.
            derived: tells what operations have computed from parameters alone (a reshaped one, say).
        """
        place = Place(self._count, -1 - index)
        if self._check is not None:
            direct = _named(self._check.leaves_behind(tensor), names)
            found = direct.difference(explained)
            if is_custom(tensor.grad_fn):
                found |= _named(self._check.leaves_behind(tensor, derived), names) - direct
            self._left |= found & self._layout.recomputed
            if found := found - self._layout.recomputed:
                self._layout.foreign[place] = frozenset(found)
        met, self._shown[tensor] = tensor in self._shown, True
        if place not in self._layout.foreign or met:
            return frozenset()
        self._met.add(place)
        self._see(place, "foreign", (), tensor)
        return self._layout.foreign[place].intersection(names.values())

    def take_from_layers(self, names: Collection[str]) -> set[str]:
        """From the next check on, those of ``names`` that were left to their layers here are so no longer.

        Returns:
            Which ones.
        """
        taken = self._left.intersection(names)
        self._layout.recomputed -= taken
        return taken

    @property
    def missed(self) -> frozenset[str]:
        """Parameters behind tensors that :meth:`behind` was not asked for, and that were there when it was
        checked: their gradients would be missing."""
        foreign = self._layout.foreign
        return frozenset[str]().union(*(foreign[place] for place in foreign.keys() - self._met))

    def rely_on(self, tensor: Tensor, name: str) -> None:
        """Gradients of the layer or parameter ``name`` will be split along the tensor's first axis."""
        if self._check is not None:
            self._check.rely_on(tensor, name)

    def test(self, output: Any, layers: Collection[str]) -> None:
        """The model has called ``layers`` and answered: in a checked pass, see whether samples stay apart."""
        if self._check is None or self.batch is None:
            return
        for place, operation in self._check.run(output, self.batch, layers):
            self._layout.learn(place, operation)
