"""The exact fallback: per-sample gradients of parameters that no layer rule explains.

A bare ``nn.Parameter``, a weight used functionally, a layer of an unknown kind: whatever it is, the
parameter enters the computation as an argument of torch functions. A TorchFunctionMode sees those
functions. Where parameter meets batch, sample b's share of the parameter's gradient is the
vector-Jacobian product of that one operation with the output's gradient masked to sample b. Where
the result has no sample axis in front (a slice of a table, a cast, a layer called on frames or
tokens folded into the batch), it is followed until one comes out that has; the share then goes the
way back, one operation at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from diffhook.compat.torch import in_backward, tree_leaves, tree_map
from diffhook.gradients.graph import Contexts
from diffhook.gradients.guard import PassGuard, on_gradient
from diffhook.gradients.sample_axis import SampleAxis
from diffhook.gradients.sources import Operation, Pair, Source, Use, back_to_parameters
from diffhook.gradients.tape import Tape, refuse_double_backward

OnGradient = Callable[[str, Tensor, torch.dtype], None]
OnObstacle = Callable[[str, str], object]

_NOT_IN_PLACE = {"__invert__", "__index__", "__int__"}
_TAKE_FORM = {"to", "type_as", "view_as", "reshape_as", "expand_as"}  # of another tensor, and no value
_TENSOR_PROPERTIES = {"T", "mT", "H", "mH", "real", "imag"}


class Fallback(TorchFunctionMode):
    """Watches one forward pass for operations on ``parameters``; reports in the backward.

    Args:
        parameters: name → parameter to watch.
        constants: the model's buffers and other parameters: known not to depend on the samples.
        batch: number of samples B.
        tape: paused while this class runs backward passes of its own.
        axis: sees every operation, and says which results have samples in front.
        guard: keeps errors of ours from the forward and backward of the user.
        on_gradient: called for every use with name, (B, *parameter.shape) gradients and the dtype
            that the operation computed in.
        on_obstacle: called with (name, reason) for a use that cannot be split by sample.
        sharded: custom functions of FSDP stand between the model's parts, whose backward is not to be run for
            a look at what is behind them.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        constants: Iterable[Tensor],
        batch: int,
        tape: Tape,
        axis: SampleAxis,
        guard: PassGuard,
        on_gradient: OnGradient,
        on_obstacle: OnObstacle,
        *,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self._sharded = sharded
        self._axis = axis
        self._batch = batch
        self._guard = guard
        self._on_gradient = on_gradient
        self._on_obstacle = on_obstacle
        self._sources = {id(p): Source(p, frozenset([n]), p.dtype) for n, p in parameters.items()}
        # Tensors that depend on no sample, such as position indices. Held, so that no id is reused.
        self._constants = {id(t): t for t in constants}
        self.watched = frozenset(parameters)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters = parameters
        self._uses: list[Use] = []
        self._followed = 0
        self._seen: set[str] = set()  # parameters that have entered an operation themselves
        self._tape = tape

    def follow(self, name: str, tensor: Tensor) -> None:
        """From now on ``tensor`` stands for a parameter, which is sharded otherwise."""
        self._sources[id(tensor)] = Source(tensor, frozenset([name]), tensor.dtype)

    def know_constant(self, tensor: Tensor) -> None:
        """Likewise for one that is not watched."""
        self._constants[id(tensor)] = tensor

    def is_ours(self, tensor: Tensor) -> bool:
        """Whether backward passes of our own start at the operation that made ``tensor``."""
        own = any(use.output is tensor and use.sources for use in self._uses)
        return own or id(tensor) in self._sources

    def claim(self, output: Tensor, names: Iterable[str]) -> bool:
        """A layer's rule asks for its parameters in the operation that made ``output``.

        Returns:
            False if the parameters entered otherwise: derived values (a weight that is scaled, masked or
            normalised first) are not what the rule explains, and are left to the fallback.
        """
        claimed = self.watched.intersection(names)
        for use in reversed(self._uses[-3:]) if claimed else ():
            if use.output is output:
                left = [s for s in use.sources if s[0].edge is not None or not s[0].names <= claimed]
                if len(use.sources) - len(left) == len(claimed):
                    use.sources = left
                    return True
        return claimed.isdisjoint(self._seen)

    @property
    def met(self) -> int:
        """How many parameters the forward has used."""
        return len(self._seen)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether the tensor is known not to depend on the samples, whatever its shape."""
        source = self._sources.get(id(tensor))
        return id(tensor) in self._constants or (source is not None and source.pure)

    def close(self) -> set[str]:
        """End of the forward: the names of parameters with uses left to the fallback."""
        names: set[str] = set()
        for use in self._uses:
            output, use.output = use.output, None
            split = frozenset[str]().union(*(source.names for source, _ in use.sources))
            names |= split
            if output is not None:
                for name in split:
                    self._axis.rely_on(output, name)
        return names

    def release(self) -> None:
        """End of the backward: let go of uses that it did not reach."""
        for use in self._uses:
            use.output = use.edge = None
            use.sources = []
        self._uses.clear()
        self._sources.clear()
        self._constants.clear()

    # ── forward ───────────────────────────────────────────────────────────────────────────────

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operation = self._guard(self._prepare, func, args, kwargs or {})
        if operation is None:  # none of our business, or we have failed: the forward goes on unwatched
            return func(*args, **(kwargs or {}))
        output = func(*operation.args, **operation.kwargs)
        self._guard(self._note, func, operation, output)
        return output

    def _prepare(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        """What is about to run on which tensors; None if it is none of our business."""
        if self._guard.error is not None or not torch.is_grad_enabled() or self._tape.blind:
            return None
        if in_backward() or _is_getter(func):
            return None
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._axis.seeks_foreign and not self._sharded:
            self._adopt_foreign(leaves)
        met = {id(t): self._sources[id(t)] for t in leaves if id(t) in self._sources}
        if not met:
            return Operation(leaves, [], args, kwargs)
        # An alias of its own for every use: the gradient of the output with respect to the alias is
        # that of this operation alone, whatever else depends on the parameter. Autograd runs the alias that
        # was made last first: so the first argument's gradient is added first, as it would be without us.
        changed = met.pop(id(args[0]), None) if args and _changes_in_place(func) else None
        used = [met[id(leaf)] for leaf in leaves if id(leaf) in met]
        on_alias = bool(args) and id(args[0]) in met
        aliases = [source.tensor.view_as(source.tensor) for source in reversed(used)]
        # An alias's place in the graph is another once the parameter is written to, as where a forward
        # normalises its weights.
        pairs: list[Pair] = list(zip(used, map(get_gradient_edge, reversed(aliases)), strict=True))
        args, kwargs = tree_map(
            lambda leaf: aliases.pop() if isinstance(leaf, Tensor) and id(leaf) in met else leaf,
            (args, kwargs),
        )
        if changed is not None and changed.edge is not None:  # an alias would be changed instead
            pairs.append((changed, changed.edge))
        return Operation(leaves, pairs, args, kwargs, on_alias)

    def _adopt_foreign(self, leaves: list[Tensor]) -> None:
        """Tensors that were made of parameters where we could not see it become sources, or uses."""
        for index, leaf in enumerate(leaves):
            if id(leaf) in self._sources or not leaf.requires_grad or leaf.grad_fn is None:
                continue
            names = self._axis.behind(index, leaf, self._names, self._seen, self._derived)
            if not names:
                continue
            self._seen |= names
            own = [self._parameters[name] for name in sorted(names)]
            parents: list[Pair] = [(self._sources[id(parameter)], parameter) for parameter in own]
            if self._axis.samples_first(leaf):
                self._use(leaf, parents).contexts = Contexts([leaf])
            else:
                self._source(leaf, parents, pure=True).contexts = Contexts([leaf])

    def _derived(self) -> set[Node]:
        return {s.edge.node for s in self._sources.values() if s.pure and s.edge is not None}

    def _note(self, func: Any, operation: Operation, output: Any) -> None:
        leaves, pairs = operation.leaves, operation.pairs
        if _name(func) == "__setitem__":  # which returns nothing, and makes another tensor of the first
            output = operation.args[0]
            self._constants.pop(id(output), None)
        self._axis.see(_name(func), leaves, output)
        results = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        followed = [t for t in results if t.requires_grad]
        if not pairs:
            if all(id(t) in self._constants for t in leaves):
                self._constants.update({id(t): t for t in results})
            return
        sources = {id(source.tensor) for source, _ in pairs}
        others = [t for t in leaves if id(t) not in sources]
        if _name(func) in _TAKE_FORM and operation.on_alias:
            others = []
        for source, _ in pairs:
            if source.edge is None and followed:  # else it was asked what it is: dim(), is_floating_point()
                self._seen |= source.names
        for result in followed:
            self._follow(result, pairs, others)

    def _follow(self, result: Tensor, pairs: list[Pair], others: Sequence[Tensor]) -> None:
        # A table may have B rows by chance. Followed on, it is exact all the same, so a sample axis
        # is believed only where samples have come in.
        samples = [t for t in others if not self.is_constant(t)]
        mixed = [source for source, _ in pairs if not source.pure]
        met = any(self._axis.samples_first(t) for t in samples)
        unfolded = bool(samples or mixed) and not any(self._axis.samples_first(s.tensor) for s in mixed)
        if self._axis.samples_first(result) and (met or unfolded):
            self._use(result, pairs)
        else:
            self._source(result, pairs, pure=not samples and not mixed)

    def _use(self, result: Tensor, pairs: list[Pair]) -> Use:
        use = Use(result, get_gradient_edge(result), list(pairs))
        on_gradient(result, self._guard, partial(self._backward, use))
        self._uses.append(use)
        return use

    def _source(self, result: Tensor, pairs: list[Pair], *, pure: bool) -> Source:
        self._followed += 1
        names = frozenset[str]().union(*(source.names for source, _ in pairs))
        dtype = min((result.dtype, *(source.dtype for source, _ in pairs)), key=_bytes)
        edge = get_gradient_edge(result)
        source = Source(result, names, dtype, pure, list(pairs), edge, self._followed)
        self._sources[id(result)] = source
        return source

    # ── backward ──────────────────────────────────────────────────────────────────────────────

    def _backward(self, use: Use, grad_output: Tensor) -> None:
        if self._tape.paused or use.edge is None:
            return
        try:
            self._report_use(use, use.edge, grad_output.detach())
        finally:
            use.edge = use.contexts = None
            use.sources = []

    def _report_use(self, use: Use, edge: GradientEdge, grad_output: Tensor) -> None:
        refuse_double_backward()
        if self._guard.error is not None:
            return
        with self._tape.at_rest():  # the nested passes below run this hook again, and the layers'
            for source, alias in use.sources:
                back = partial(self._back, edge, alias, use.contexts)
                for name, gradient in self._split(source, back, grad_output).items():
                    self._on_gradient(name, gradient, min(grad_output.dtype, source.dtype, key=_bytes))

    def _split(
        self, source: Source, back: Callable[[Tensor], Tensor], grad_output: Tensor
    ) -> dict[str, Tensor]:
        """name → (B, *shape) for every parameter behind ``source``, once more where that fails: what fails
        once may be chance; an obstacle is for good."""
        try:
            return self._split_once(source, back, grad_output)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # the next pass may fit
        except Exception:
            pass  # its frames are to be gone before the second time
        try:
            return self._split_once(source, back, grad_output)
        except Exception as error:
            for name in source.names:
                self._on_obstacle(name, f"the exact fallback failed: {error}")
            return {}

    def _split_once(
        self, source: Source, back: Callable[[Tensor], Tensor], grad_output: Tensor
    ) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in source.names}
        for sample in range(self._batch):
            masked = torch.zeros_like(grad_output)
            masked[sample] = grad_output[sample]
            for name, gradient in back_to_parameters(source, back(masked)):
                parts[name].append(gradient)
        return {name: torch.stack(rows) for name, rows in parts.items()}

    def _back(
        self,
        edge: GradientEdge,
        alias: Tensor | GradientEdge,
        contexts: Contexts | None,
        grad_output: Tensor,
    ) -> Tensor:
        """The gradient at a source's alias."""
        with contexts or nullcontext():
            (share,) = torch.autograd.grad(edge, alias, grad_output, retain_graph=True)
        return share


def _bytes(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


def _changes_in_place(func: Any) -> bool:
    """Whether ``func`` changes its first argument."""
    name = _name(func)
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")


def _is_getter(func: Any) -> bool:
    """Whether ``func`` reads an attribute (shape, dtype, grad …) rather than computing."""
    name = _name(func)
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in _TENSOR_PROPERTIES
    return name == "__set__"
