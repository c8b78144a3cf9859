"""Adds up the per-sample gradients of one pass, layer by layer and use by use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffhook.errors import CaptureError, ConfigurationError
from diffhook.gradients.layers import Owned
from diffhook.gradients.products import may_stay_half
from diffhook.gradients.rules import Call, Factors, Mixers, Product, Reduced, factors
from diffhook.gradients.sketch import FullGradient, Sketch
from diffhook.gradients.totals import Totals

# Bytes of per-sample products alive at once. On a processor they should stay in its cache; an
# accelerator wants few, large launches.
_WORKSPACE = {"cpu": 8 << 20}
_WORKSPACE_ELSEWHERE = 256 << 20

Audit = Callable[[str, Tensor, Tensor], None]  # parameter, sum over samples, sum of squared norms


class PassAccumulator:
    """Per-sample gradients of one pass, on their way into :class:`Totals`.

    Args:
        layers: name → layer with a rule.
        sketch: the projection; None for norms only.
        group_size: M consecutive rows make one sample.
        workspace: bytes of per-sample products alive at once.
        shared: whether a parameter, by name, has uses besides one call of one layer: its parts must
            be added before norms can be taken.
        preconditioner: parameter name → elementwise factor on its gradients.
    """

    def __init__(
        self,
        layers: Mapping[str, Owned],
        sketch: Sketch | FullGradient | None,
        group_size: int,
        workspace: int,
        shared: Callable[[str], bool],
        preconditioner: Mapping[str, Tensor],
    ) -> None:
        self.audit: Audit | None = None  #: told of every product that is not kept for :attr:`pending`
        self.batch: int | None = None  #: rows of the batch, once the model has been called
        self.totals: Totals | None = None
        self.pending: dict[str, Tensor] = {}  #: (B, *shape) of shared parameters
        self.taken: set[str] = set()  #: layers
        self.formed: set[str] = set()  #: layers whose weight products every pass forms, checked or not
        self.precision = torch.float64  #: the lowest seen among gradients
        self._waiting: dict[str, list[Call[Any]]] = {}  # calls of layers called several times
        self._arrived: Counter[str] = Counter()  # calls of each layer that the backward has reached
        self._dtype = torch.float32  # to compute in; float64 for models that are
        self._layers = layers
        self._sketch = sketch
        self._group_size = group_size
        self._workspace = max(workspace // 4, 1)  # numbers
        self._shared = shared
        self._preconditioner = preconditioner

    def add_layer(
        self, layer: str, inputs: Tensor, grad_output: Tensor, calls: int, summed: dict[str, Tensor] | None
    ) -> None:
        """Add what one call of a layer gives its parameters.

        Args:
            layer: its name.
            inputs, grad_output: (B, …).
            calls: how often the forward has called it.
            summed: if given, receives the gradients summed over the batch, by parameter's local name.

        Raises:
            CaptureError: a call more than the forward has shown.
        """
        owned = self._layers[layer]
        self._note_dtype(grad_output.dtype)
        half = owned.rule.takes_half and may_stay_half(grad_output)
        grad = grad_output if half else grad_output.to(self._dtype)
        call = Call(owned.module, inputs, grad, owned.parameters)
        self._arrived[layer] += 1
        if self._arrived[layer] > calls:
            raise CaptureError(
                f"{layer} was differentiated more often than it was called", kind="double backward"
            )
        self.taken.add(layer)
        if calls > 1 and summed is None and owned.rule.joins:
            waiting = self._waiting.setdefault(layer, [])
            waiting.append(call)
            if len(waiting) == calls:
                self._take_joined(layer)
            return
        self._take(layer, call, several=calls > 1, summed=summed)

    def _take_joined(self, layer: str) -> None:
        """Take all calls of a layer at once."""
        call = self._layers[layer].rule.join(self._waiting.pop(layer))
        self._take(layer, call, several=False, summed=None)

    def _take(self, layer: str, call: Call[Any], *, several: bool, summed: dict[str, Tensor] | None) -> None:
        owned = self._layers[layer]
        formed = several or (not owned.rule.gives_factors and (summed is not None or self.audit is not None))
        needless = {} if several else self._mixers(owned, call.grad_output)
        call = replace(call, mixers={} if formed else needless)
        for rows in self._chunks(owned, call, formed=several):
            for local, product in owned.rule.products(call.of(rows)):
                matrix = _matrix(product, wanted=local not in call.mixers)
                if summed is not None:
                    part = _summed(product if matrix is None else matrix)
                    summed[local] = summed[local].add_(part) if local in summed else part
                if local not in call.mixers and matrix is not None:
                    product = matrix
                whole = matrix is not None and matrix.dim() > 2
                if whole and not several and (local not in needless or owned.rule.gives_factors):
                    self.formed.add(layer)
                self._add(owned.parameters[local], product, matrix, rows, len(call), several=several)

    def add_use(self, name: str, gradient: Tensor, dtype: torch.dtype) -> None:
        """Add (B, *shape) gradients from the fallback, computed in ``dtype``."""
        self._note_dtype(dtype)
        self._postpone(name, gradient.to(self._dtype), slice(0, len(gradient)), len(gradient))

    @property
    def is_empty(self) -> bool:
        """Whether the backward has reached nothing."""
        return self.totals is None and not self.pending and not self._waiting

    def flush(self) -> None:
        """The backward is over: take calls that waited for others that it has not reached."""
        for layer in list(self._waiting):
            self._take_joined(layer)

    def complete(self, without: Collection[str]) -> None:
        """Add what was postponed, except the parameters named in ``without``."""
        for name in self.pending.keys() - set(without):
            product = self._preconditioned(name, self.pending[name])
            self._sums(product.device).add(name, product, 0)
        self.pending.clear()

    # ── one product ───────────────────────────────────────────────────────────────────────────

    def _add(
        self, name: str, product: Product, matrix: Tensor | None, rows: slice, batch: int, *, several: bool
    ) -> None:
        if isinstance(product, Reduced):
            self._sums(product.norms.device).add_reduced(name, product, rows)
            return
        if several or self._shared(name):
            assert isinstance(product, Tensor)  # a parameter with other uses is in no mixers
            self._postpone(name, product, rows, batch)
            return
        if self.audit is not None:
            known = product if matrix is None else matrix
            self.audit(name, _summed(known), _squares(known))
        if isinstance(product, Factors):
            self._sums(product.grads.device).add_factors(name, product, matrix, rows)
        else:
            self._sums(product.device).add(name, self._preconditioned(name, product), rows.start)

    def _preconditioned(self, name: str, product: Tensor) -> Tensor:
        factor = self._preconditioner.get(name)
        return product if factor is None else product * factor.to(product)

    def _postpone(self, name: str, product: Tensor, rows: slice, batch: int) -> None:
        """Keep the product: the parameter has other uses, and gradients add before norms do."""
        if name not in self.pending:
            self.pending[name] = product.new_zeros(batch, *product.shape[1:])
        self.pending[name][rows] += product

    def _mixers(self, owned: Owned, like: Tensor) -> dict[str, Mixers | None]:
        """Local names whose products need not be formed, and how to mix them; None: by factors."""
        if self._group_size > 1 or isinstance(self._sketch, FullGradient):
            return {}
        own = {
            local: name
            for local, name in owned.parameters.items()
            if not self._shared(name) and name not in self._preconditioner
        }
        if self._sketch is None:
            return dict.fromkeys(own)
        found: dict[str, Mixers | None] = {}
        tokens = like[0].numel() // like.shape[-1]
        for local, name in own.items():
            mixers = self._sketch.mixers(name, like) if owned.rule.mixes_channels(owned.module) else None
            if mixers is not None or (owned.rule.gives_factors and self._sketch.takes_factors(name, tokens)):
                found[local] = mixers
        return found

    def _chunks(self, owned: Owned, call: Call[Any], *, formed: bool) -> Iterator[slice]:
        """Runs of rows that fit the workspace together; whole groups."""
        size = owned.rule.workspace(call)
        unseen = next(call.module.parameters(recurse=False), None) is None  # by the rule: they are sharded
        if formed or unseen or self._group_size > 1 or isinstance(self._sketch, FullGradient):
            size = max(size, owned.largest)
        step = max(self._workspace // max(size, 1), 1)
        step = max(step - step % self._group_size, self._group_size)
        for start in range(0, len(call), step):
            yield slice(start, min(start + step, len(call)))

    def _note_dtype(self, dtype: torch.dtype) -> None:
        self._dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if dtype.itemsize < self.precision.itemsize:
            self.precision = dtype

    def _sums(self, device: torch.device) -> Totals:
        if self.totals is None:
            assert self.batch is not None
            self.totals = Totals(self.batch, self._group_size, self._sketch, device, self._dtype)
        return self.totals


def _matrix(product: Product, *, wanted: bool) -> Tensor | None:
    """The product itself where it is there, wanted, or the sooner way to norms."""
    if isinstance(product, Factors):
        return factors.formed(product) if wanted or factors.forms(product) else None
    return product if isinstance(product, Tensor) else None


def _summed(product: Product) -> Tensor:
    """The gradient of the whole batch."""
    assert not isinstance(product, Reduced)
    return factors.summed(product) if isinstance(product, Factors) else product.sum(0)


def _squares(product: Tensor | Factors) -> Tensor:
    """Sum over rows of their squared norms."""
    if isinstance(product, Factors):
        return factors.gram_squares(product).sum()
    return product.flatten().square().sum()


def workspace_on(device: torch.device) -> int:
    """Bytes of per-sample products that may be alive at once, where nobody says how many."""
    return _WORKSPACE.get(device.type, _WORKSPACE_ELSEWHERE)


def check_preconditioner(factors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Whether each factor is one parameter's.

    Raises:
        ConfigurationError: it does not fit the parameters.
    """
    for name, factor in factors.items():
        if name not in shapes:
            raise ConfigurationError(f"the preconditioner names {name!r}, which is not trained")
        if factor.shape != shapes[name]:
            raise ConfigurationError(
                f"the preconditioner of {name} has shape {tuple(factor.shape)}; "
                f"expected {tuple(shapes[name])}"
            )
