"""Whether a first axis that is as long as the batch is the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from diffhook.errors import SurveyAgainError
from diffhook.gradients.tape import Tape

_AT_ONCE = 64 << 20  # numbers whose gradients are alive together

SAMPLES_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm)
"""Layers that define their first axis themselves."""


def leading_axis(values: Iterable[Any]) -> int | None:
    """Length of the first axis of the first tensor that has one."""
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() > 0), None)


class Layout:
    """Which operations of a forward pass give tensors with samples in front: learned in a pass whose
    shapes tell, or by trial; it holds for later batches that are as long as another axis."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, bool]] = {}

    def learn(self, number: int, operation: str, samples_first: bool) -> None:
        self._known[number] = operation, samples_first

    def answer(self, number: int, operation: str) -> bool | None:
        """None: not known, or the pass is another one."""
        known, samples_first = self._known.get(number, ("", False))
        return samples_first if known == operation else None


class SampleAxis:
    """Tells samples in front from tokens in front when there are as many of both.

    The shapes of tensors with two axes as long as the batch tell nothing. Where no earlier pass does,
    and a gradient depends on it, they are noted; once the gradient of the model's output is there, that
    of one sample alone is sent back: a tensor with samples in front gets it in one row.

    Args:
        layout: of earlier passes; learns.
        tape: paused while the gradient of one sample runs back.
        learning: whether this pass is the first, or looks anew.

    Attributes:
        batch: number of samples B, once the model has been called.
        deceived: why the pass cannot be used: a tensor had something else in front.
    """

    def __init__(self, layout: Layout, tape: Tape, *, learning: bool) -> None:
        self.batch: int | None = None
        self.deceived: SurveyAgainError | None = None
        self._layout = layout
        self._tape = tape
        self._learning = learning
        self._number = 0  # of the last operation
        self._otherwise = WeakIdKeyDictionary()  # doubtful tensors with something else in front
        self._noted: list[tuple[int, str, GradientEdge, int]] = []
        self._needed = False

    def samples_first(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.batch and tensor not in self._otherwise

    def see(self, operation: str, output: Any) -> None:
        """The next operation of the forward has given ``output``."""
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors or operation == "detach":  # the tape asks shapes and detaches, more or less often
            return
        self._number += 1
        for tensor in tensors:
            if tensor.dim() > 2:
                self._see(operation, tensor)

    def _see(self, operation: str, tensor: Tensor) -> None:
        if not self._doubtful(tensor):
            if self._learning:
                self._layout.learn(self._number, operation, tensor.shape[0] == self.batch)
            return
        answer = self._layout.answer(self._number, operation)
        if answer is False:
            self._otherwise[tensor] = True
        elif answer is None and self._learning and tensor.requires_grad:
            self._noted.append((self._number, operation, get_gradient_edge(tensor), tensor.numel()))

    def _doubtful(self, tensor: Tensor) -> bool:
        return tensor.shape[0] == tensor.shape[1] == self.batch

    def rely_on(self, tensor: Tensor) -> None:
        """Gradients will be split along the first axis of this tensor."""
        self._needed = self._needed or (tensor.dim() > 2 and self._doubtful(tensor))

    def watch(self, output: Any) -> None:
        """The model has answered: its output has samples in front."""
        for tensor in tree_leaves(output) if self._needed else ():
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.shape[:1] == (self.batch,):
                tensor.register_hook(partial(self._try, get_gradient_edge(tensor)))
                return

    def release(self) -> None:
        """Let go of the graph."""
        self._noted.clear()

    def _try(self, output: GradientEdge, gradient: Tensor) -> None:
        if self._tape.paused:
            return
        sample = int(gradient.detach().flatten(1).norm(dim=1).argmax())
        masked = torch.zeros_like(gradient)
        masked[sample] = gradient[sample]
        self._tape.paused = True
        try:
            for part in self._parts():
                edges = [edge for _, _, edge, _ in part]
                found = torch.autograd.grad(output, edges, masked, retain_graph=True, allow_unused=True)
                for (number, operation, _, _), share in zip(part, found, strict=True):
                    if share is not None:
                        self._judge(number, operation, share.flatten(1).any(dim=1), sample)
        except RuntimeError:  # reentrant checkpointing does not allow it
            pass
        finally:
            self._tape.paused = False

    def _judge(self, number: int, operation: str, reached: Tensor, sample: int) -> None:
        """A tensor's rows were ``reached`` by the gradient of one sample."""
        reached[sample] = False
        samples_first = not bool(reached.any())
        self._layout.learn(number, operation, samples_first)
        if not samples_first:
            self.deceived = SurveyAgainError(
                f"layers were called with another axis in front than the samples, {self.batch} of either: "
                "this pass is left out, and the next one looks anew"
            )

    def _parts(self) -> Iterator[list[tuple[int, str, GradientEdge, int]]]:
        """What was noted, in parts of a bounded size."""
        noted, self._noted = self._noted, []
        while noted:
            count = size = 0
            while count < len(noted) and (count == 0 or size + noted[count][3] <= _AT_ONCE):
                size += noted[count][3]
                count += 1
            yield noted[:count]
            noted = noted[count:]
