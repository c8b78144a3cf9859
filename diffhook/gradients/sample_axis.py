"""Which tensors of a forward have the samples of the batch in front, one row each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from diffhook.gradients.separability import Place, SeparabilityCheck


def leading_axis(values: Iterable[Any]) -> int | None:
    """Length of the first axis of the first tensor that has one."""
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() > 0), None)


class Layout:
    """The operations of a forward whose results have something else than samples in front.

    Learned from shapes, and by the check of separability; it holds for later batches, where a first axis
    may be as long as the batch by chance. Once learned it stays: the fallback is exact either way.
    """

    def __init__(self) -> None:
        self._others: dict[Place, str] = {}

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

    def __init__(self, layout: Layout, check: SeparabilityCheck | None) -> None:
        self.batch: int | None = None
        self._layout = layout
        self._check = check
        self._count = 0  # of operations
        self._otherwise = WeakIdKeyDictionary()  # tensors with something else in front

    def samples_first(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.batch and tensor not in self._otherwise

    def see(self, operation: str, inputs: Sequence[Tensor], output: Any) -> None:
        """The next operation of the forward has made ``output`` of ``inputs``."""
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors or operation == "detach":  # which the tape calls more or less often
            return
        self._count += 1
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

    def rely_on(self, tensor: Tensor, name: str) -> None:
        """Gradients of the layer or parameter ``name`` will be split along the tensor's first axis."""
        if self._check is not None:
            self._check.rely_on(tensor, name)

    def test(self, output: Any) -> None:
        """The model has answered: in a checked pass, see whether samples stay apart."""
        if self._check is None or self.batch is None:
            return
        for place, operation in self._check.run(output, self.batch):
            self._layout.learn(place, operation)
