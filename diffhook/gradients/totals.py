"""What a pass adds up: squared norms and projections, sample by sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffhook.errors import CaptureError
from diffhook.gradients import host
from diffhook.gradients.norms import piece_norms
from diffhook.gradients.open_packs import OpenPack, open_pack
from diffhook.gradients.packs import ALIGNED, Pack
from diffhook.gradients.rules import Factors, Reduced, factors
from diffhook.gradients.sketch import FullGradient, Sketch


class _Parts(NamedTuple):
    """Norms of parts of gradients, or their squares: (b, k) for some rows of the batch."""

    values: Tensor
    rows: slice
    squared: bool
    columns: Mapping[str, slice]  # of each parameter


class Totals:
    """Running sums over parameters for the B/M samples of a batch.

    Nothing is waited for, and nothing is done for a small parameter alone that can be done for many.

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
        self._parts: list[_Parts] = []
        self._arrived: dict[str, None] = {}  # parameters in the order of the backward
        self._open: dict[int, OpenPack] = {}
        self._sums: Tensor | None = None
        if sketch is not None:
            self._sums = torch.zeros(samples, sketch.dim, dtype=dtype, device=device)

    # ── results ───────────────────────────────────────────────────────────────────────────────

    @property
    def squares(self) -> Tensor:
        """(B/M,) float64 squared norms so far."""
        self._close_all()
        alike: dict[tuple[int, int, bool], list[Tensor]] = defaultdict(list)
        for part in self._parts:
            alike[part.rows.start, part.rows.stop, part.squared].append(part.values)
        total = torch.zeros(self.samples, dtype=torch.float64, device=self._device)
        for (start, stop, squared), values in alike.items():
            wide = torch.cat(values, 1).double()
            total[start:stop] += (wide if squared else wide.square_()).sum(1)
        return total

    @property
    def projected(self) -> Tensor | None:
        """(B/M, D) projections so far; None for norms only."""
        self._close_all()
        return self._sums

    def first_nonfinite(self) -> str | None:
        """The first parameter to be added with a gradient that is not finite."""
        self._close_all()
        if not self._parts:
            return None
        broken = host.read(torch.stack([~part.values.isfinite().all() for part in self._parts]))
        names: set[str] = set()
        for part, bad in zip(self._parts, broken, strict=True):
            if bad:
                each = [~part.values[:, columns].isfinite().all() for columns in part.columns.values()]
                found = zip(part.columns, host.read(torch.stack(each)), strict=True)
                names |= {name for name, wrong in found if wrong}
        return next((name for name in self._arrived if name in names), None)

    # ── what is added ─────────────────────────────────────────────────────────────────────────

    def add(self, name: str, product: Tensor, start: int) -> None:
        """Add one parameter's gradients of rows start, start+1, …; their memory is used up."""
        if self._group_size > 1:
            product = product.view(-1, self._group_size, *product.shape[1:]).sum(1)
            start //= self._group_size
        rows = slice(start, start + len(product))
        self._arrived.setdefault(name)
        sketch, flat = self._sketch, product.reshape(len(product), -1)
        if isinstance(sketch, Sketch) and name in sketch.small:
            self._pack(sketch.small[name], name, flat, rows)
            return
        self._note(name, piece_norms(flat), rows, squared=False)
        if sketch is None or self._sums is None:
            return
        if isinstance(sketch, FullGradient):
            sketch.add(name, product, self._sums[rows])
        elif name in sketch.reduced:
            self._pack(sketch.reduced[name], name, sketch.reduce(name, product), rows)
        else:
            sketch.fold(name, flat, self._sums[rows])

    def add_factors(self, name: str, product: Factors, formed: Tensor | None, rows: slice) -> None:
        """Add a matrix's gradient by its factors, and by itself, (b, O, I), where it is formed."""
        self._arrived.setdefault(name)
        sketch = self._sketch
        if formed is None:
            self._note(name, factors.gram_squares(product), rows, squared=True)
        else:
            self._note(name, piece_norms(formed.flatten(1)), rows, squared=False)
        if isinstance(sketch, Sketch) and self._sums is not None:
            if name in sketch.reduced:
                self._pack(sketch.reduced[name], name, sketch.reduce_factors(name, product, formed), rows)
            elif product.grads.shape[1] > 1:  # the rule has other tokens than its output's shape told
                whole = factors.formed(product) if formed is None else formed
                sketch.fold(name, whole.flatten(1), self._sums[rows])
            else:
                sketch.fold_outer(name, product, self._sums[rows])

    def add_reduced(self, name: str, product: Reduced, rows: slice) -> None:
        """Add what stands for a product that was never formed."""
        self._arrived.setdefault(name)
        self._note(name, product.norms, rows, squared=product.squared)
        if product.mixed is not None and isinstance(self._sketch, Sketch):
            self._pack(self._sketch.reduced[name], name, product.mixed, rows)

    def _note(self, name: str, values: Tensor, rows: slice, *, squared: bool) -> None:
        self._parts.append(_Parts(values, rows, squared, {name: slice(None)}))

    # ── packs ─────────────────────────────────────────────────────────────────────────────────

    def _pack(self, pack: Pack, name: str, values: Tensor, rows: slice) -> None:
        """Put (b, n) numbers where they belong; the last one to come closes the pack."""
        opened = self._open.get(id(pack))
        if opened is None:
            opened = self._open[id(pack)] = open_pack(pack, self.samples, values)
        opened.add(name, values, rows)
        if not opened.left:
            self._close(opened)

    def _close(self, opened: OpenPack) -> None:
        pack, values = opened.pack, opened.values()
        del self._open[id(pack)]
        sketch, everyone = self._sketch, slice(0, self.samples)
        assert isinstance(sketch, Sketch)
        assert self._sums is not None
        if next(iter(pack.slices)) in sketch.small:
            columns = {n: slice(s.start // ALIGNED, -(-s.stop // ALIGNED)) for n, s in pack.slices.items()}
            norms = torch.linalg.vector_norm(values.view(self.samples, -1, ALIGNED), dim=2)
            self._parts.append(_Parts(norms, everyone, False, columns))
        sketch.fold(pack, values, self._sums)

    def _close_all(self) -> None:
        """Fold packs some of whose members have not come: their gradients are zero."""
        for opened in list(self._open.values()):
            self._close(opened)
