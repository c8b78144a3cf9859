"""Law two, separability: the gradient of one sample reaches that sample's row of every layer, no other.

At the end of a checked forward, a random gradient of the model's output is sent back twice: as it is, and
with every sample's row multiplied by a factor of its own (0, 1, ½, ¼, …). Backpropagation is linear, so a
tensor whose rows are the samples, in order, receives its rows multiplied by the same factors. Batch
statistics, sorted or rolled batches, a table whose length happens to be the batch's, and tokens in front
where there are as many as samples, all break this.

What it costs: two backward passes of activations, without weight gradients. The user's hooks on activations
run twice more in such a pass, and so do custom autograd functions: what they keep in ``ctx`` is put back, but
one whose backward has other side effects (FP8 scaling) sees them. What it cannot see: computations hidden
from torch functions (compiled regions), and a loss that couples samples after the model has answered
(contrastive terms). The gradient of the output alone does not tell; a row is then the sum over all losses
that depend on the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from diffhook.compat.torch import WeakIdKeyDictionary, tree_leaves
from diffhook.gradients import host
from diffhook.gradients.graph import Contexts, leaves_behind
from diffhook.gradients.guard import Guard, on_gradient
from diffhook.gradients.sharding import NO_SEPARABILITY, is_sharded
from diffhook.gradients.tape import Tape

_FACTORS = 17  # 0 and powers of two down to 2⁻¹⁵: exact in floating point
_FACTORS_HALF = 7  # float16 has fewer exponents
_EXACT = 1e-2  # relative; factors differ by two
_ROUNDED = 0.1
_NOISE = 1e-6  # of the largest row


class Place(NamedTuple):
    """Where in the forward a tensor was made."""

    operation: int  # how many came before
    result: int  # of several


class SeparabilityCheck:
    """The test of one pass.

    Args:
        model: whose buffers and random state the test leaves alone, also where checkpointed blocks are
            computed again.
        tape: paused meanwhile.
        guard: keeps errors of ours from the user's backward.
        seed: varies factors from check to check.

    Attributes:
        violated: name of layer or parameter → whether another axis could be mistaken for the batch,
            for every one whose tensor was relied on.
        unchecked: the error that the test ended in; None if it did not.
        alone: the batch had one sample only.
        unreached: layers whose rows the test did not see.
    """

    def __init__(self, model: nn.Module, tape: Tape, guard: Guard, seed: int) -> None:
        self.violated: dict[str, bool] = {}
        self.unchecked: str | None = None
        self.alone = False
        self.unreached: set[str] = set()
        self._model = model
        self._tape = tape
        self._guard = guard
        self._seed = seed
        self._relied: dict[Place, tuple[str, bool]] = {}
        self._tested: set[str] = set()  # of several models that a pass calls, each is tested after its call
        self._handles: list[RemovableHandle] = []
        self._norms: dict[Place, Tensor] = {}  # of the rows that the backward under way has reached
        self._running = False
        self._forget()

    def _forget(self) -> None:
        """Nothing of the last forward is held."""
        self._places = WeakIdKeyDictionary()
        self._nodes: set[Node] = set()  # of all results
        self._noted: dict[Place, str] = {}
        self._roots: list[GradientEdge] = []  # where the graph of the forward begins
        self._last: Tensor | None = None
        self._half = False
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def release(self) -> None:
        """Let go of the graph, in which our hooks hold us."""
        self._forget()
        self._norms = {}

    # ── forward ───────────────────────────────────────────────────────────────────────────────

    def note(
        self, place: Place, operation: str, inputs: Sequence[Tensor], tensor: Tensor, *, rows: bool
    ) -> None:
        """An operation's result; ``rows``: its first axis is taken for the samples."""
        if not tensor.requires_grad or tensor.grad_fn is None:
            return
        if not any(t.grad_fn is not None and t in self._places for t in inputs):
            self._roots.append(get_gradient_edge(tensor))
        self._places[tensor] = place
        self._nodes.add(tensor.grad_fn)
        if rows:
            self._noted[place] = operation
            self._last = tensor
            self._half = self._half or tensor.dtype == torch.float16
            self._handles.append(on_gradient(tensor, self._guard, partial(self._reach, place)))

    def leaves_behind(self, tensor: Tensor, through: Callable[[], set[Node]] = set) -> list[Tensor]:
        """The leaves directly behind a tensor that no operation has shown; none if one has.

        Args:
            through: tells results that may lie between.
        """
        if tensor.grad_fn is None or tensor in self._places:
            return []
        return leaves_behind(tensor.grad_fn, self._nodes - through())

    def rely_on(self, tensor: Tensor, name: str) -> None:
        place = self._places.get(tensor)
        if place is not None:
            ambiguous = tensor.dim() > 1 and tensor.shape[0] in tensor.shape[1:]
            self._relied[place] = name, ambiguous

    # ── test ──────────────────────────────────────────────────────────────────────────────────

    def run(self, output: Any, batch: int, layers: Collection[str]) -> list[tuple[Place, str]]:
        """Test the forward that has ended.

        Args:
            output: what the model has answered.
            batch: number of samples.
            layers: those that were called, and whose rule explains the call.

        Returns:
            (place, operation) of tensors whose rows are not the samples.
        """
        judged: dict[Place, bool] = {}
        self.alone = batch == 1
        starts = self._starts(output, batch)
        if is_sharded(self._model):
            self.unchecked = NO_SEPARABILITY
        elif not self.alone and starts and not _communicates(self._model):
            try:
                judged = self._send_back(starts, batch)
            except Exception as error:  # reentrant checkpointing forbids it; custom functions are the loop's
                self.unchecked = (str(error) or type(error).__name__).splitlines()[0]
        for place, (name, ambiguous) in self._relied.items():
            if judged.get(place) is False:
                self.violated[name] = ambiguous
        self._tested |= {name for place, (name, _) in self._relied.items() if place in judged}
        self.unreached = set() if self.alone else set(layers) - self._tested
        found = [(place, self._noted[place]) for place, apart in judged.items() if not apart]
        self._forget()
        return found

    def _starts(self, output: Any, batch: int) -> list[Tensor]:
        """What the model has answered, or the last tensor that had samples in front."""
        leaves = tree_leaves(output)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            leaves = tree_leaves(list(getattr(output, "__dict__", {}).values()))
        starts = [t for t in leaves if isinstance(t, Tensor) and self._places.get(t) in self._noted]
        return starts or ([] if self._last is None else [self._last])

    def _send_back(self, starts: list[Tensor], batch: int) -> dict[Place, bool]:
        """Whether the rows made at each place are the samples."""
        random = torch.Generator().manual_seed(self._seed)
        factors = self._factors(batch, random)
        gradients = [torch.randn(t.shape, generator=random).to(t) for t in starts]
        scaled = [
            gradient * factors.to(gradient).view(-1, *[1] * (gradient.dim() - 1)) for gradient in gradients
        ]
        with self._tape.at_rest():
            plain = self._backward(starts, gradients)
            reached = self._backward(starts, scaled)
        return self._compare(plain, reached, factors)

    def _factors(self, batch: int, random: torch.Generator) -> Tensor:
        count = _FACTORS_HALF if self._half else _FACTORS
        turns = torch.randperm(batch, generator=random) % count
        return torch.where(turns == 0, 0.0, 2.0 ** (1.0 - turns))

    def _backward(self, starts: list[Tensor], gradients: list[Tensor]) -> dict[Place, Tensor]:
        self._norms, self._running = {}, True
        try:
            with _undisturbed(self._model), Contexts(starts):
                torch.autograd.grad(starts, self._roots, gradients, retain_graph=True, allow_unused=True)
        finally:
            self._running = False
        return self._norms

    def _reach(self, place: Place, gradient: Tensor) -> None:
        if self._running:
            rows = gradient.detach().reshape(len(gradient), -1)
            self._norms[place] = torch.linalg.vector_norm(rows, dim=1).float()

    def _compare(
        self, plain: dict[Place, Tensor], reached: dict[Place, Tensor], factors: Tensor
    ) -> dict[Place, bool]:
        places = [place for place in plain if place in reached]
        if not places:
            return {}
        device = plain[places[0]].device
        norms = torch.stack([plain[place].to(device) for place in places])
        found = torch.stack([reached[place].to(device) for place in places])
        expected = norms * factors.to(device)
        noise = _NOISE * (norms.amax(1, keepdim=True) + _NOISE * norms.nan_to_num(0, 0, 0).max())
        wrong = (found - expected).abs() > (_ROUNDED if self._half else _EXACT) * expected + noise
        return {place: not bad for place, bad in zip(places, host.read(wrong.any(1)), strict=True)}


def _communicates(model: nn.Module) -> bool:
    """Whether a backward of our own would leave other processes waiting."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return distributed.get_world_size() > 1 and any(
        isinstance(module, nn.SyncBatchNorm) and module.training for module in model.modules()
    )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put random state and buffers back: checkpointed blocks are computed again, and change them."""
    device = next(model.parameters()).device
    buffers = [b for module in model.modules() if module.training for b in module.buffers(recurse=False)]
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in buffers]
    try:
        with ExitStack() as stack:
            if device.type == "cpu":
                stack.enter_context(torch.random.fork_rng(devices=[]))
            else:
                stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
            yield
    finally:
        for buffer, version, value in kept:
            if buffer._version != version:
                buffer.data.copy_(value)  # not seen by autograd, which may have saved it
