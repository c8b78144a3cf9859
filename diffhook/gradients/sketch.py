"""The random projection: one count sketch that all parameters of a model share."""

from __future__ import annotations

import torch
from torch import Tensor

from diffhook.errors import ConfigurationError
from diffhook.gradients.signs import offset, signs


class Sketch:
    """Projects gradients to ``dim`` numbers: element *i* of parameter *n* goes, with a random sign,
    to bucket (i + offset_n) mod dim.

    The map is linear, and inner products are unbiased: E⟨Pg, Ph⟩ = ⟨g, h⟩ with variance about
    (‖g‖²‖h‖² + ⟨g, h⟩²)/dim. Signs and offsets depend on the seed and the parameter's name only, so
    the map is the same on every rank, device and batch split (Charikar et al. 2002; the shared
    buckets keep inner products better than a concatenation of one small block per layer).

    Args:
        dim: number of buckets D, at least 1.
        seed: seed of signs and offsets.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        if dim < 1:
            raise ConfigurationError(f"projection_dim is {dim}; expected a positive integer")
        self.dim = dim
        self.seed = seed
        self._signs: dict[tuple[str, torch.device], Tensor] = {}

    def add(self, name: str, products: Tensor, out: Tensor) -> None:
        """Add the projection of ``products`` to ``out``. Overwrites ``products``.

        Args:
            name: the parameter's name.
            products: (b, n) per-sample gradients of the parameter, flattened; used as scratch.
            out: (b, D) accumulator.
        """
        products.mul_(self._sign_row(name, products.shape[1], products.device))
        self._fold(products, offset(self.seed, name, self.dim), out)

    def _sign_row(self, name: str, count: int, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._signs:
            # int8, a byte per parameter: a float copy would cost as much memory as the model.
            self._signs[key] = torch.from_numpy(signs(self.seed, name, count)).to(device)
        return self._signs[key]

    def _fold(self, signed: Tensor, start: int, out: Tensor) -> None:
        """Add element i of every row to bucket (start + i) mod D."""
        batch, count = signed.shape
        head = min(self.dim - start, count)
        out[:, start : start + head].add_(signed[:, :head])
        turns = (count - head) // self.dim
        tail = head + turns * self.dim
        if turns:
            out.add_(signed[:, head:tail].view(batch, turns, self.dim).sum(1))
        if tail < count:
            out[:, : count - tail].add_(signed[:, tail:])


class FullGradient:
    """The identity in place of a projection: the whole gradient, parameters side by side.

    For small models and for checking what a projection loses. Same interface as :class:`Sketch`.

    Args:
        sizes: parameter name → number of elements, in the order of concatenation.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.dim = sum(sizes.values())
        self.seed = 0
        self._start: dict[str, int] = {}
        start = 0
        for name, size in sizes.items():
            self._start[name] = start
            start += size

    def add(self, name: str, products: Tensor, out: Tensor) -> None:
        start = self._start[name]
        out[:, start : start + products.shape[1]].add_(products)
