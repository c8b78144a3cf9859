"""Whether what the model is trained on is the batch that came last.

A loop may go through its loader once, keep latents of its own and train on those: then the last batch of the
loader is not what is trained, and its ids would be wrong. The model's input x_t = a x + b ε tells.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 32  # of a batch that are compared
_PLACES = 4096  # of a row
_OTHERS = 8  # rows that a row is compared with, where there are so many
_WINDOW = 48  # batches that count
_LEAST_ROWS = 24
_LEAST_BATCHES = 3
_FLOOR = 0.1  # no row tells its fit more exactly than that, so that few rows cannot decide alone
_FIT = 0.2  # mean fit of related rows is above: about 0.4 where timesteps are uniform
_NO_FIT = 0.15  # and that of unrelated ones below
_SURE = 4.0  # standard errors
_TINY = 1e-12
_DISPLACED = 6.0
_RANK_SURE = 4.0
_RANK_DOUBT = 1.5


@dataclass(frozen=True)
class _Evidence:
    """Sums over the rows of a batch: weights, weights · fits, weights² · (1, fits, fits²), ranks."""

    rows: int
    weight: float
    fit: float
    squares: tuple[float, float, float]
    rank: float
    rank_variance: float
    displaced: bool  # a row is surely another one's, and not the one in its place


class InputFit:
    """Gathers evidence on whether the model's inputs stem from the batches' own clean rows.

    The fit of a row is how much of its clean sample its noisy one holds, beside what other samples have in
    common with it. If they are related it is about a, or a · rms(x) / rms(x_t) where the loop scales x down;
    about 0 if not. Samples that are blank or nearly equal tell nothing and weigh nothing.
    """

    def __init__(self) -> None:
        self._evidence: deque[_Evidence] = deque(maxlen=_WINDOW)
        self._earlier: Tensor | None = None  # clean samples of earlier batches, to compare with

    def add(self, clean: Tensor, noisy: Tensor) -> bool:
        """One call of the model. Returns whether its rows may be the batch's, each in its place.

        Args:
            clean: (B, …) samples of the batch, scaled and shifted in any way.
            noisy: (B, …) what the model was called on; of another shape, it tells nothing.
        """
        if (
            clean.shape != noisy.shape
            or clean.dim() < 2
            or not clean.numel()
            or not clean.is_floating_point()
        ):
            return False
        rows = _prepared(noisy.detach()[:_ROWS])
        pictures = self._with_earlier(clean.detach()[:_ROWS])
        ways = [_prepared(pictures)]
        if pictures.dim() > 2:
            ways.append(_prepared(pictures.flip(-1)))
        if not all(bool(torch.isfinite(values).all()) for values in (rows, *ways)):
            return False
        evidence = _compare(ways, rows)
        if evidence is not None:
            self._evidence.append(evidence)
        return evidence is None or not evidence.displaced

    def _with_earlier(self, clean: Tensor) -> Tensor:
        """The rows of a small batch, followed by some of earlier batches."""
        earlier, together = self._earlier, clean
        if earlier is not None and earlier.shape[1:] == clean.shape[1:]:
            new = [row for row in earlier.to(clean) if not any(torch.equal(row, own) for own in clean)]
            together = torch.cat([clean, *(row[None] for row in new[: max(_OTHERS - len(clean), 0)])])
        self._earlier = together[:_OTHERS].clone()
        return together

    @property
    def verdict(self) -> bool | None:
        """Whether inputs stem from the batches; None as long as there is not enough evidence."""
        held = self._evidence
        weight = sum(e.weight for e in held)
        if not weight:
            return None
        mean = sum(e.fit for e in held) / weight
        ones, fits, squares = (sum(e.squares[power] for e in held) for power in range(3))
        spread = max(squares - 2 * mean * fits + mean * mean * ones, 0.0)
        error = math.sqrt(1 / weight + spread / weight**2)
        variance = sum(e.rank_variance for e in held)
        rank = sum(e.rank for e in held) / math.sqrt(variance) if variance else 0.0
        compared = all(e.rank_variance for e in held)  # a row alone resembles any of a similar picture
        if rank > _RANK_SURE or (compared and mean - _SURE * error > _FIT):
            return True
        enough = len(held) >= _LEAST_BATCHES and sum(e.rows for e in held) >= _LEAST_ROWS
        return False if enough and rank < _RANK_DOUBT and mean + _SURE * error < _NO_FIT else None


def _prepared(values: Tensor) -> Tensor:
    """(B, d) float64 on the CPU, some places of each row, with the mean of each channel taken out."""
    flat = values.flatten(2) if values.dim() > 2 else values[:, None]
    flat = flat[:, :, :: -(-flat[0].numel() // _PLACES)].to("cpu", torch.float64)
    return (flat - flat.mean(2, keepdim=True)).flatten(1)


def _compare(ways: list[Tensor], noisy: Tensor) -> _Evidence | None:
    """Of (B + k, d) clean rows, as they are and flipped, with the (B, d) noisy ones of the first B.

    None where nothing can be told.
    """
    strength = noisy.square().mean(1).sqrt()[:, None]
    fits, errors = [], []
    for clean in ways:
        own, size = _own_parts(clean), clean.square().mean(1).sqrt()
        length = own.norm(dim=1)
        # The loop may have scaled the clean rows down to the noise's size, but not noise to theirs.
        larger = torch.maximum(strength, size)
        telling = (own * clean).sum(1)  # what a row is more like itself than like the others
        usable = (telling > 0.2 * length.square()) & (length > 1e-5 * clean.norm(dim=1)) & (length > _TINY)
        share = (noisy @ own.T) / telling.clamp(min=_TINY)
        fits.append(share * larger / strength.clamp(min=_TINY))
        exact = larger * length / telling.clamp(min=_TINY)
        errors.append(torch.where(usable & (strength > _TINY), exact, torch.inf))
    fit, error = torch.stack(fits).amax(0), torch.stack(errors).amax(0)
    usable = torch.isfinite(error)
    rows = torch.nonzero(usable.diagonal()).flatten()
    if not len(rows):
        return None
    others = torch.arange(len(noisy), usable.shape[1])
    columns = torch.cat([rows, others[usable[rows[0], others]]])
    fit, error = fit[rows][:, columns], error[rows][:, columns]
    own_error = error.diagonal()
    values = fit.diagonal() - own_error * _by_chance(fit / error, len(ways))
    weight = 1 / (own_error.square() + _FLOOR**2)
    rank, variance = _ranks(fit / error)
    return _Evidence(
        rows=len(values),
        weight=float(weight.sum()),
        fit=float((weight * values).sum()),
        squares=(
            float(weight.square().sum()),
            float((weight.square() * values).sum()),
            float((weight * values).square().sum()),
        ),
        rank=rank,
        rank_variance=variance,
        displaced=_are_displaced(fit / error),
    )


def _are_displaced(scores: Tensor) -> bool:
    """Whether a row fits another sample by far better than its own, of which it shows nothing; scores are in
    standard errors of what chance would make of them."""
    own = scores.diagonal()
    return bool(((own < _DISPLACED / 2) & (scores.amax(1) - own > _DISPLACED)).any())


def _own_parts(clean: Tensor) -> Tensor:
    """(B, d) what each row has beside the mean of the others; of a single row all."""
    count = len(clean)
    if count == 1:
        return clean
    return clean - clean.mean(0)  # the difference from the mean of the others × (1 − 1/B)


def _by_chance(scores: Tensor, ways: int) -> Tensor:
    """(B,) the mean of each row's scores with other rows: above 0, as the better of two ways counts."""
    count = scores.shape[1]
    if count == 1:
        return torch.full((1,), 0.5642 if ways > 1 else 0.0, dtype=scores.dtype)  # of two normal numbers
    return (scores.sum(1) - scores.diagonal()) / (count - 1)


def _ranks(scores: Tensor) -> tuple[float, float]:
    """By how much own scores, on the diagonal, outrank those with other rows, and the variance by chance."""
    rows, count = scores.shape
    if count < 2:
        return 0.0, 0.0
    own = scores.diagonal()[:, None]
    share = ((own > scores).sum(1) / (count - 1) - 0.5).sum()
    return float(share), rows * (count + 1) / (12 * (count - 1))
