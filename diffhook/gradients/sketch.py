"""The random projection: one count sketch that all parameters of a model share."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffhook.errors import ConfigurationError
from diffhook.gradients.rules import Mixers, Outer
from diffhook.gradients.signs import offset, signs

_MIXED = 32  # channels that a wide convolution is mixed down to
_WIDTH = 1 << 14  # numbers a sample accumulates into: long runs at once, still in the cache


class Sketch:
    """Projects gradients to ``dim`` numbers.

    Element *i* of parameter *n* goes, with a random sign, to bucket (i + offset_n) mod dim: a count
    sketch whose buckets all parameters share (Charikar et al. 2002), computed by folding. The weight
    of a wide convolution (kernel > 1, 128 channels or more on both sides) is first mixed down to 32
    by 32 channels by random ±1/√32 matrices, so that its full product need not be formed.

    The map is linear and inner products are unbiased: E⟨Pg, Ph⟩ = ⟨g, h⟩. It depends on the seed and
    on the parameters' names and shapes only, so it is the same on every rank, device and batch split.

    Args:
        dim: number of buckets D, at least 1.
        seed: seed of signs and offsets.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        if dim < 1:
            raise ConfigurationError(f"projection_dim is {dim}; expected a positive integer")
        self.dim = dim
        self.seed = seed
        self.width = dim * max(_WIDTH // dim, 1)  #: of accumulators: several sets of buckets, side by side
        self._signs: dict[tuple[str, torch.device], Tensor] = {}
        self._mixers: dict[tuple[str, torch.device, torch.dtype], Mixers] = {}

    def mixers(self, name: str, shape: torch.Size, like: Tensor) -> Mixers | None:
        """The channel mixers of a wide convolution's weight; None for every other parameter."""
        if len(shape) < 3 or math.prod(shape[2:]) == 1 or min(shape[0], shape[1]) < 4 * _MIXED:
            return None
        key = (name, like.device, like.dtype)
        if key not in self._mixers:
            self._mixers[key] = Mixers(
                self._mixer(f"{name}:in", shape[1], like), self._mixer(f"{name}:out", shape[0], like)
            )
        return self._mixers[key]

    def add(self, name: str, products: Tensor, out: Tensor) -> None:
        """Add the projection of ``products`` to ``out``.

        Args:
            name: the parameter's name.
            products: (b, *shape) per-sample gradients of the parameter.
            out: (b, D) accumulator, or several sets of buckets side by side: (b, width).
        """
        mixers = self.mixers(name, products.shape[1:], products)
        if mixers is not None:
            products = torch.einsum("boi...,ip,oq->bqp...", products, *mixers)
        self.add_mixed(name, products.reshape(len(products), -1), out)

    def add_outer(self, name: str, outer: Outer, out: Tensor) -> None:
        """The same as :meth:`add` of the product, which is not formed where buckets fall into rows.

        Where I divides D, bucket d takes row after row from the same column i: its sum over rows is
        a matrix product of ``left`` with the signs, times ``right``.
        """
        (batch, rows), columns = outer.left.shape, outer.right.shape[1]
        if self.dim % columns or rows * columns < self.dim:
            self.add(name, outer.formed(), out)
            return
        height = self.dim // columns  # rows side by side in the buckets
        turns = -(-rows // height)
        padding = turns * height - rows
        signs = self._sign_row(name, rows * columns, out).view(rows, columns)
        left = F.pad(outer.left, (0, padding)).view(batch, turns, height).permute(2, 0, 1)
        signs = F.pad(signs, (0, 0, 0, padding)).view(turns, height, columns).transpose(0, 1)
        # Contiguous: with other strides bmm may take seven times as long.
        folded = (
            torch.bmm(left.contiguous(), signs.contiguous())
            .transpose(0, 1)
            .mul(outer.right.unsqueeze(1))
            .reshape(batch, -1)
        )
        start = offset(self.seed, name, self.dim)
        out[:, start : self.dim].add_(folded[:, : self.dim - start])
        out[:, :start].add_(folded[:, self.dim - start :])

    def add_mixed(self, name: str, mixed: Tensor, out: Tensor) -> None:
        """Add (b, n) numbers that need no mixing, or have had it: element i of every row, with its
        sign, to bucket (offset + i) mod D. In one pass over them."""
        count = mixed.shape[1]
        signs = self._sign_row(name, count, mixed)
        done, bucket = 0, offset(self.seed, name, self.dim)
        if bucket + count <= out.shape[1]:  # most parameters are small, and there are many
            out.narrow(1, bucket, count).addcmul_(mixed, signs)
            return
        while done < count:
            run = min(out.shape[1] - bucket, count - done)
            part = slice(done, done + run)
            out[:, bucket : bucket + run].addcmul_(mixed[:, part], signs[part])
            done, bucket = done + run, 0

    def folded(self, out: Tensor) -> Tensor:
        """(b, width) accumulator → (b, D) projections."""
        return out.view(len(out), -1, self.dim).sum(1)

    def _sign_row(self, name: str, count: int, like: Tensor) -> Tensor:
        key = (name, like.device)
        if key not in self._signs:
            # int8, a byte per parameter: a float copy would cost as much memory as the model.
            self._signs[key] = torch.from_numpy(signs(self.seed, name, count)).to(like.device)
        return self._signs[key].to(like.dtype)

    def _mixer(self, name: str, channels: int, like: Tensor) -> Tensor:
        values = torch.from_numpy(signs(self.seed, name, channels * _MIXED)).to(like)
        return values.view(channels, _MIXED) / math.sqrt(_MIXED)


class FullGradient:
    """The identity in place of a projection: the whole gradient, parameters side by side.

    For small models and for checking what a projection loses. Same interface as :class:`Sketch`.

    Args:
        sizes: parameter name → number of elements, in the order of concatenation.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.dim = self.width = sum(sizes.values())
        self.seed = 0
        self._start: dict[str, int] = {}
        start = 0
        for name, size in sizes.items():
            self._start[name] = start
            start += size

    def add(self, name: str, products: Tensor, out: Tensor) -> None:
        start = self._start[name]
        flat = products.reshape(len(products), -1)
        out[:, start : start + flat.shape[1]].add_(flat)

    def folded(self, out: Tensor) -> Tensor:
        return out


def check_projection_dim(value: Any) -> None:
    """What a user gives as D.

    Raises:
        ConfigurationError: negative, or neither an integer nor "full".
    """
    if value != "full" and (not isinstance(value, int) or value < 0):
        raise ConfigurationError(f'projection_dim is {value!r}; expected an integer ≥ 0 or "full"')


def make_sketch(
    projection_dim: int | Literal["full"], seed: int, parameters: dict[str, nn.Parameter]
) -> Sketch | FullGradient | None:
    """The projection that ``projection_dim`` asks for; None for 0.

    Raises:
        ConfigurationError: negative, or neither an integer nor "full".
    """
    check_projection_dim(projection_dim)
    if projection_dim == "full":
        return FullGradient({name: p.numel() for name, p in parameters.items()})
    return Sketch(projection_dim, seed) if projection_dim else None
