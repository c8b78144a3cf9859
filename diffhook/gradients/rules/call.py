"""What a layer rule is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Mixers(NamedTuple):
    """Random reductions of a convolution's channels, entries of one size: the mix of both sides, times
    ``scale``, keeps inner products.

    For a weight of shape (O, I, *kernel), whichever way its layer runs.
    """

    inward: Tensor  # (I, q)
    outward: Tensor  # (O, q)
    scale: float


class Reduced(NamedTuple):
    """What is needed of a gradient product that was never formed."""

    norms: Tensor  # (B, k), of k parts
    squared: bool  # whether the norms are
    mixed: Tensor | None  # (B, q·q·kernel), the product of the mixed factors, outward by inward, scaled


class Factors(NamedTuple):
    """The gradient Σ_t grads[:, t] ⊗ inputs[:, t] of a matrix; not formed."""

    grads: Tensor  # (B, T, O)
    inputs: Tensor  # (B, T, I)


Product = Tensor | Reduced | Factors


@dataclass(frozen=True)
class Call(Generic[M]):
    """One call of a layer, and the gradient that has come back to it.

    Attributes:
        module: the layer.
        inputs: its input, (B, …), detached; any dtype and strides.
        grad_output: ∂loss/∂output, (B, …), in the dtype to compute in, float32 or float64, or, for a rule
            that ``takes_half``, in the half precision that it came in; any strides.
        wanted: names among the layer's own parameters that are trained.
        mixers: the wanted names whose gradient need not be formed. With mixers, :class:`Reduced` will do,
            mixed by them; with None, :class:`Factors` will do, and where nothing is projected, any
            :class:`Reduced`. The formed gradient is always right.
    """

    module: M
    inputs: Tensor
    grad_output: Tensor
    wanted: Collection[str]
    mixers: Mapping[str, Mixers | None] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of samples B."""
        return len(self.grad_output)

    def of(self, rows: slice) -> Call[M]:
        """The same call, of some samples only."""
        return replace(self, inputs=self.inputs[rows], grad_output=self.grad_output[rows])
