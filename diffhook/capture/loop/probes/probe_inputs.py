"""What probes need of the samples, taken from the training's own calls: no item is loaded again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture import Probe
from diffhook.capture.loop.probes.conditions import Conditions, tensors
from diffhook.capture.objective.noise import noise_seed
from diffhook.capture.probes.grid import take
from diffhook.capture.samples.inputs import SHARED
from diffhook.log.samples import ROLE_STRIDE
from diffhook.words import size

_BYTES = 1 << 30  # of inputs that are kept; further samples are not probed


class ProbeInputs:
    """Clean samples (latents where the loop makes latents) and conditions, as the denoiser was given them.

    On the CPU, at most a gibibyte, and never in the log.

    Args:
        probe: how many samples, or which.
        all_or_none: keep nothing where not all of them have room.
    """

    def __init__(self, probe: Probe, *, all_or_none: bool = False) -> None:
        self._probe, self._all_or_none = probe, all_or_none
        self._model: nn.Module | None = None
        self._population: int | None = None
        self._named = set(probe.samples) if isinstance(probe.samples, Sequence) else None
        self._items: dict[int, tuple[Tensor, dict[str, Any]]] = {}  # as default_inputs takes them
        self._told: dict[int, float] = {}  # the timestep of each item's call
        self._form: dict[str, Any] = {}  # of the first item
        self._conditions = Conditions()
        self._bytes = 0
        self.refused = ""  #: why these calls cannot be made again, in words

    def __len__(self) -> int:
        return len(self._items)

    def begin(self, model: nn.Module, samples: int | None) -> None:
        """Say what is trained, and on how many samples; None: not known."""
        self._model, self._population = model, samples

    def wants(self, sample_ids: Tensor) -> bool:
        """Whether a pass over these samples has any that are still missing, or that prove something."""
        if self.refused:
            return False
        proves = self._conditions.looks and any(i in self._items for i in sample_ids.tolist())
        return proves or (self._bytes < _BYTES and any(True for _ in self._missing(sample_ids)))

    def see(
        self,
        sample_ids: Tensor,
        clean: Tensor,
        told: Tensor,
        held: Callable[[], Sequence[Tensor]],
        call: tuple[nn.Module, Any, Any],
    ) -> None:
        """Keep what is missing.

        Args:
            sample_ids: (B,).
            clean: (B, …), of the same rows.
            told: (B,) the timesteps of the call.
            held: gives what the loader's batch holds of these rows, (B, …) each.
            call: the denoiser's module, and the arguments that it was called with, in order and by name.
        """
        module, args, kwargs = call
        conditions = self._conditions.read(self._model, module, args, kwargs, clean)
        samples, times = sample_ids.tolist(), told.tolist()
        before = {
            row: self._items[sample][1]
            for row, sample in enumerate(samples)
            if sample in self._items and self._told[sample] != times[row]
        }
        self._conditions.prove(conditions, held, before)
        for row, earlier in before.items():
            self._conditions.compare(samples[row], row, conditions, earlier)
        if self._conditions.refused:
            self._refuse(self._conditions.refused)
            return
        missing = {sample: row for row, sample in self._missing(sample_ids)}
        if not missing or self._bytes >= _BYTES or not self._fits(_form(clean, conditions)):
            return
        index = torch.tensor(list(missing.values()), dtype=torch.long, device=clean.device)
        kept = _to_cpu(take((clean.detach(), conditions), index))  # once a batch: it may wait
        for position, (sample, row) in enumerate(missing.items()):
            item = take(kept, torch.tensor([position]))
            self._items[sample], self._told[sample] = item, times[row]
            self._bytes += sum(each.numel() * each.element_size() for each in _all_tensors(item))
            if self._bytes >= _BYTES:
                break
        self._refuse_too_many()

    def _fits(self, form: dict[str, Any]) -> bool:
        """Whether further samples can be in a batch with the first, or need not."""
        self._form = self._form or form
        if form != self._form and self._probe.batch_size > 1:
            self._refuse(_difference(self._form, form))
        return not self.refused

    def end(self) -> None:
        """The training is over: what is not proven by now is refused."""
        if self._items and not self.refused and (why := self._conditions.unproven):
            self._refuse(why)

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._items.clear()

    def _refuse_too_many(self) -> None:
        needed = self._bytes / max(len(self._items), 1) * (self._population or 0)
        if self._all_or_none and needed > _BYTES:
            self._refuse(
                f"the inputs of all {self._population:,} samples would take {size(needed)} of memory, and "
                f"{size(_BYTES)} are kept at most. probe=Probe(512) takes some of them"
            )

    def probe(self) -> Probe:
        """Of the samples that are kept by now; further ones join as they come, once they are proven."""
        items = _Kept({} if self._conditions.unproven else self._items)
        return replace(
            self._probe,
            samples=None,
            dataset=items,
            collate=partial(_collated, shared=self._conditions.shared),
            identify=lambda batch, positions: [items.ids[position] for position in positions],
            names=items.ids,
            population=self._population,
        )

    def _missing(self, sample_ids: Tensor) -> Iterator[tuple[int, int]]:
        for row, sample in enumerate(sample_ids.tolist()):
            if sample < ROLE_STRIDE and sample not in self._items and self._chosen(sample):
                yield row, sample

    def _chosen(self, sample: int) -> bool:
        """By a hash of the id: processes and resumed runs choose the same, evenly over all there are."""
        wanted = self._probe.samples
        if self._named is not None:
            return sample in self._named
        if wanted is None or self._population is None or not isinstance(wanted, int):
            return wanted is None or not isinstance(wanted, int) or len(self._items) < wanted
        share = noise_seed(self._probe.grid.seed, 0.0, 0, sample) / 2**63
        return share < wanted / self._population


class _Kept:
    """The items as a dataset."""

    def __init__(self, items: dict[int, Any]) -> None:
        self._items = items
        self.ids = sorted(items)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> Any:
        return self._items[self.ids[position]]


def _form(clean: Tensor, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """What must not differ between samples of a batch: argument → shape of a row; "": of the sample."""
    return {"": _row_shape(clean)} | {name: _row_shape(value) for name, value in conditions.items()}


def _row_shape(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _row_shape(inner) for name, inner in value.items()}
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else None


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    name = next(name for name in {**one, **other} if one.get(name) != other.get(name))
    alone = "probe=Probe(512, batch_size=1) takes samples one at a time"
    if not name:
        return f"samples have several shapes, such as {one[name]} and {other[name]}. {alone}"
    if name not in one or name not in other:
        return f"the model is given {name!r} in some calls, and in others not. {alone}"
    return f"the model is given {name!r} in several shapes, such as {one[name]} and {other[name]}. {alone}"


def _collated(items: list[Any], *, shared: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Items as :func:`default_inputs` takes a batch."""
    clean, conditions = _joined(items)
    alike = {name: value.expand(len(clean), *value.shape) for name, value in shared.items()}
    return clean, {**conditions, SHARED: alike} if alike else conditions


def _joined(items: list[Any]) -> Any:
    """Single-row items as a batch."""
    if items[0] is None:
        return None
    if isinstance(items[0], Tensor):
        return torch.cat(items)
    if isinstance(items[0], tuple):
        return tuple(_joined(list(each)) for each in zip(*items, strict=True))
    return {key: _joined([item[key] for item in items]) for key in items[0]}


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(map(_to_cpu, value))
    return {key: _to_cpu(inner) for key, inner in value.items()}


def _all_tensors(item: tuple[Tensor, dict[str, Any]]) -> Iterator[Tensor]:
    yield item[0]
    yield from tensors(item[1])
