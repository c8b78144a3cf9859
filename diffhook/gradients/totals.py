"""What a pass adds up: squared norms and projections, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from diffhook.errors import CaptureError
from diffhook.gradients.norms import squared_norms
from diffhook.gradients.rules import Outer, Reduced
from diffhook.gradients.sketch import FullGradient, Sketch


class Totals:
    """Running sums over parameters for the B/M samples of a batch.

    Args:
        batch: rows of the batch, B.
        group_size: M consecutive rows make one sample.
        sketch: the projection; None for norms only.
        device, dtype: of the projections; squares are float64.

    Raises:
        CaptureError: the batch does not divide into groups.
    """

    def __init__(
        self,
        batch: int,
        group_size: int,
        sketch: Sketch | FullGradient | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        samples, ragged = divmod(batch, group_size)
        if ragged:
            message = f"a batch of {batch} rows does not divide into groups of {group_size}"
            raise CaptureError(message, kind="ragged")
        self._group_size = group_size
        self._sketch = sketch
        self.samples = samples
        self._device = device
        self._trail: list[tuple[str, Tensor, slice]] = []  # squares that were added, and for which samples
        self._sums: Tensor | None = None
        if sketch is not None:
            self._sums = torch.zeros(samples, sketch.width, dtype=dtype, device=device)

    @property
    def squares(self) -> Tensor:
        """(B/M,) float64 squared norms so far."""
        # Summed lazily: adding inside the backward is slower.
        total = torch.zeros(self.samples, dtype=torch.float64, device=self._device)
        whole = [squares for _, squares, _ in self._trail if len(squares) == self.samples]
        if whole:
            total += torch.stack(whole).sum(0)
        for _, squares, rows in self._trail:
            if len(squares) < self.samples:
                total[rows] += squares
        return total

    @property
    def projected(self) -> Tensor | None:
        """(B/M, D) projections so far; None for norms only."""
        if self._sketch is None or self._sums is None:
            return None
        return self._sketch.folded(self._sums)

    def add(self, name: str, product: Tensor, start: int) -> None:
        """Add one parameter's gradients of rows start, start+1, …"""
        if self._group_size > 1:
            product = product.view(-1, self._group_size, *product.shape[1:]).sum(1)
            start //= self._group_size
        rows = slice(start, start + len(product))
        self._trail.append((name, squared_norms(product.reshape(len(product), -1)), rows))
        if self._sketch is not None and self._sums is not None:
            self._sketch.add(name, product, self._sums[rows])

    def add_outer(self, name: str, outer: Outer, rows: slice) -> None:
        """Add a gradient that is an outer product."""
        if self._group_size > 1 or isinstance(self._sketch, FullGradient):
            self.add(name, outer.formed(), rows.start)
            return
        left, right = (torch.linalg.vector_norm(side, dim=1).double() for side in outer)
        self._trail.append((name, (left * right).square(), rows))
        if self._sketch is not None and self._sums is not None:
            self._sketch.add_outer(name, outer, self._sums[rows])

    def add_reduced(self, name: str, product: Reduced, rows: slice) -> None:
        """Add what stands for a product that was never formed."""
        self._trail.append((name, product.squares, rows))
        if product.mixed is not None and self._sums is not None:
            assert isinstance(self._sketch, Sketch)
            self._sketch.add_mixed(name, product.mixed, self._sums[rows])

    def first_nonfinite(self) -> str | None:
        """The first parameter to be added with a gradient that is not finite."""
        return next((name for name, squares, _ in self._trail if not bool(squares.isfinite().all())), None)
