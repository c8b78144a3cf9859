"""The random projection: one count sketch that all parameters of a model share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffhook.errors import ConfigurationError
from diffhook.gradients import tensor_sketch
from diffhook.gradients.packs import Pack, packed
from diffhook.gradients.products import is_half, widened
from diffhook.gradients.rules import Factors, Mixers
from diffhook.gradients.signs import signs

_SIDES = (("in", 1), ("out", 0))  # of a convolution's weight, and their axes
_MIXED = 32  # channels that a wide convolution is mixed down to
_WIDE = 256  # of both sides of a matrix that is sketched through its factors
_SMALL = 1 << 15  # numbers; parameters with fewer are packed


class Sketch:
    """Projects gradients to ``dim`` numbers.

    A count sketch whose buckets all parameters share (Charikar et al. 2002), computed by folding: element *i*
    of a gradient goes, with a random sign, to bucket i mod dim. Parameters of fewer than 32,768 numbers are
    first put side by side, in the order of their names. Two kinds of weight are reduced before that, so that
    their full products need not be formed: wide convolutions (kernel > 1, 128 channels or more on both sides)
    to 32 by 32 channels by random ±1 matrices, and wide matrices (256 or more on both sides) to 512
    numbers by a :mod:`tensor sketch <diffhook.gradients.tensor_sketch>`.

    The map is linear and inner products are unbiased: E⟨Pg, Ph⟩ = ⟨g, h⟩. It depends on the seed and
    on the parameters' names and shapes only, so it is the same on every rank, device and batch split.

    Args:
        dim: number of buckets D, at least 1.
        shapes: parameter name → shape.
        seed: seed of the signs.
    """

    VERSION = 3  #: of the map; projections of different versions cannot be compared

    def __init__(self, dim: int, shapes: Mapping[str, torch.Size], seed: int = 0) -> None:
        if dim < 1:
            raise ConfigurationError(f"projection_dim is {dim}; expected a positive integer")
        self.dim = dim
        self.seed = seed
        self._shapes = dict(sorted(shapes.items()))
        reduced = {n: _reduced_size(s) for n, s in self._shapes.items() if is_reduced(s)}
        small = {n: s.numel() for n, s in self._shapes.items() if n not in reduced and s.numel() < _SMALL}
        #: name → pack, of parameters whose whole gradient is packed, and of those that are reduced
        self.small = {name: pack for pack in packed(small) for name in pack.slices}
        self.reduced = {name: pack for pack in packed(reduced) for name in pack.slices}
        self._signs: dict[tuple[str, torch.device], Tensor] = {}
        self._mixers: dict[tuple[str, torch.device, torch.dtype], Mixers] = {}
        self._outer: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._sides: dict[tuple[str, torch.device], tensor_sketch.Signs] = {}

    def mixers(self, name: str, like: Tensor) -> Mixers | None:
        """The channel mixers of a wide convolution's weight; None for every other parameter."""
        shape = self._shapes[name]
        if not _is_wide_convolution(shape):
            return None
        key = (name, like.device, like.dtype)
        if key not in self._mixers:
            inward, outward = (self._mixer(f"{name}:{side}", shape[axis], like) for side, axis in _SIDES)
            # Half-precision maps might become too small if they were scaled before.
            scaled = (outward, 1 / _MIXED) if is_half(like) else (outward / _MIXED, 1.0)
            self._mixers[key] = Mixers(inward, *scaled)
        return self._mixers[key]

    def takes_factors(self, name: str, tokens: int) -> bool:
        """Whether a matrix's gradient of so many tokens need not be formed.

        Wide matrices are for :meth:`reduce`; an outer product (one token) is for :meth:`fold_outer` where
        the columns divide D.
        """
        shape = self._shapes[name]
        outer = tokens == 1 and len(shape) == 2 and self.dim % shape[1] == 0 and shape.numel() >= self.dim
        return name in self.reduced if _is_wide_matrix(shape) else outer and name not in self.small

    def reduce_factors(self, name: str, product: Factors, formed: Tensor | None) -> Tensor:
        """(b, n): what stands for a wide matrix's gradients.

        Args:
            product: their factors.
            formed: the gradients, (b, O, I), where they have been formed.
        """
        signs = self._side_signs(name, product.grads.device)
        if formed is None:
            return tensor_sketch.of_factors(product, signs)
        return tensor_sketch.of_either(product, formed, signs)

    def reduce(self, name: str, product: Tensor) -> Tensor:
        """(b, n): what stands for the gradients of a parameter in :attr:`reduced`."""
        if _is_wide_matrix(self._shapes[name]):
            return tensor_sketch.of_product(product, self._side_signs(name, product.device))
        mixers = self.mixers(name, product)
        assert mixers is not None
        return (
            torch.einsum("boi...,ip,oq->bqp...", product, mixers.inward, mixers.outward).flatten(1)
            * mixers.scale
        )

    def fold(self, name: str | Pack, values: Tensor, out: Tensor) -> None:
        """Add the projection of a large parameter's gradients, or of a pack, to ``out``.

        Args:
            values: (b, n); changed in place.
            out: (b, D).
        """
        values.mul_(self._sign_row(name, values.device))
        whole = values.shape[1] - values.shape[1] % self.dim
        if whole:
            out.add_(values[:, :whole].view(len(values), -1, self.dim).sum(1))
        if whole < values.shape[1]:
            out[:, : values.shape[1] - whole].add_(values[:, whole:])

    def fold_outer(self, name: str, outer: Factors, out: Tensor) -> None:
        """:meth:`fold` of a gradient with T = 1, an outer product, which is not formed.

        Where I divides D, bucket d takes row after row from the same column: its sum over rows is a matrix
        product of the left side with the signs, times the right one.
        """
        left, right = widened(outer.grads[:, 0]), widened(outer.inputs[:, 0])
        (batch, rows), columns = left.shape, right.shape[1]
        height = self.dim // columns  # rows side by side in the buckets
        if rows % height:
            left = F.pad(left, (0, -rows % height))
        # Contiguous: with other strides bmm may take seven times as long.
        left = left.view(batch, -1, height).permute(2, 0, 1).contiguous()
        folded = torch.bmm(left, self._outer_signs(name, height, left))
        out.view(batch, height, columns).addcmul_(folded.transpose(0, 1), right.unsqueeze(1))

    def _outer_signs(self, name: str, height: int, like: Tensor) -> Tensor:
        """(height, turns, I): the signs of :meth:`fold_outer`, 0 where there are no more rows."""
        key = (name, like.device, like.dtype)
        if key not in self._outer:
            rows, columns = self._shapes[name]
            signs = self._sign_row(name, like.device).view(rows, columns)
            turns = F.pad(signs, (0, 0, 0, -rows % height)).view(-1, height, columns)
            self._outer[key] = turns.transpose(0, 1).to(like.dtype).contiguous()
        return self._outer[key]

    def project(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """(b, D) projections of whole gradients, parameter name → (b, *shape)."""
        first = next(iter(gradients.values()))
        out = first.new_zeros(len(first), self.dim)
        rows: dict[int, tuple[Pack, Tensor]] = {}
        for name, gradient in gradients.items():
            pack = self.small.get(name) or self.reduced.get(name)
            if pack is None:
                self.fold(name, gradient.reshape(len(gradient), -1).clone(), out)
                continue
            _, packs = rows.setdefault(id(pack), (pack, first.new_zeros(len(first), pack.size)))
            packs[:, pack.slices[name]] = (
                self.reduce(name, gradient) if name in self.reduced else gradient.reshape(len(gradient), -1)
            )
        for pack, packs in rows.values():
            self.fold(pack, packs, out)
        return out

    def _sign_row(self, name: str | Pack, device: torch.device) -> Tensor:
        """int8, a byte per number: a float copy would cost as much memory as the model."""
        if isinstance(name, Pack):
            return self._pack_signs(name, device)
        return self._kept(name, self._shapes[name].numel(), device)

    def _pack_signs(self, pack: Pack, device: torch.device) -> Tensor:
        key = (f"pack of {next(iter(pack.slices))}", device)
        if key not in self._signs:
            row = torch.ones(pack.size, dtype=torch.int8)
            for name, where in pack.slices.items():
                row[where] = torch.from_numpy(signs(self.seed, name, where.stop - where.start))
            self._signs[key] = row.to(device)
        return self._signs[key]

    def _kept(self, name: str, count: int, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._signs:
            self._signs[key] = torch.from_numpy(signs(self.seed, name, count)).to(device)
        return self._signs[key]

    def _side_signs(self, name: str, device: torch.device) -> tensor_sketch.Signs:
        if (name, device) not in self._sides:
            rows, columns = self._shapes[name]
            self._sides[name, device] = tensor_sketch.Signs.of(
                self._kept(f"{name}:out", rows, device), self._kept(f"{name}:in", columns, device)
            )
        return self._sides[name, device]

    def _mixer(self, name: str, channels: int, like: Tensor) -> Tensor:
        return torch.from_numpy(signs(self.seed, name, channels * _MIXED)).to(like).view(channels, _MIXED)


def _is_wide_convolution(shape: torch.Size) -> bool:
    return len(shape) > 2 and math.prod(shape[2:]) > 1 and min(shape[:2]) >= 4 * _MIXED


def _is_wide_matrix(shape: torch.Size) -> bool:
    return len(shape) == 2 and min(shape) >= _WIDE


def is_reduced(shape: torch.Size) -> bool:
    """Whether a parameter of this shape is reduced before it is folded."""
    return _is_wide_convolution(shape) or _is_wide_matrix(shape)


def _reduced_size(shape: torch.Size) -> int:
    return tensor_sketch.SIZE if _is_wide_matrix(shape) else _MIXED * _MIXED * math.prod(shape[2:])


class FullGradient:
    """The identity in place of a projection: the whole gradient, parameters side by side.

    For small models and for checking what a projection loses.

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
        """Add (b, *shape) gradients of a parameter to ``out``, (b, D)."""
        start = self._start[name]
        flat = products.reshape(len(products), -1)
        out[:, start : start + flat.shape[1]].add_(flat)


def check_projection_dim(value: Any) -> None:
    """What a user gives as D.

    Raises:
        ConfigurationError: negative, or neither an integer nor "full".
    """
    if value != "full" and (not isinstance(value, int) or value < 0):
        raise ConfigurationError(f'projection_dim is {value!r}; expected an integer ≥ 0 or "full"')


def make_sketch(
    projection_dim: int | Literal["full"], seed: int, shapes: Mapping[str, torch.Size]
) -> Sketch | FullGradient | None:
    """The projection that ``projection_dim`` asks for; None for 0.

    Raises:
        ConfigurationError: negative, or neither an integer nor "full".
    """
    check_projection_dim(projection_dim)
    if projection_dim == "full":
        return FullGradient({name: shape.numel() for name, shape in shapes.items()})
    return Sketch(projection_dim, shapes, seed) if projection_dim else None
