"""What probes need of the samples, taken from the training's own calls: no item is loaded again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffhook.capture import Probe
from diffhook.capture.loop.watches.call_inspection import NAMES
from diffhook.capture.objective.noise import noise_seed
from diffhook.capture.probes.grid import take
from diffhook.capture.samples.inputs import CONDITIONS
from diffhook.log.samples import ROLE_STRIDE

_BYTES = 1 << 30  # of inputs that are kept; further samples are not probed
_INPUT = ("sample", "hidden_states", "x", "latents")  # what denoisers call their noisy samples
_PASSED_ON = ("return_dict",)


class ProbeInputs:
    """Clean samples (latents where the loop makes latents) and conditions, as the denoiser was given them.

    On the CPU, at most a gibibyte, and never in the log.

    Args:
        probe: how many samples, or which.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._model: nn.Module | None = None
        self._population: int | None = None
        self._named = set(probe.samples) if isinstance(probe.samples, Sequence) else None
        self._items: dict[int, Any] = {}
        self._bytes = 0
        self.refused = ""  #: why these calls cannot be made again, in words

    def __len__(self) -> int:
        return len(self._items)

    def begin(self, model: nn.Module, samples: int | None) -> None:
        """Say what is trained, and on how many samples; None: not known."""
        self._model, self._population = model, samples

    def wants(self, sample_ids: Tensor) -> bool:
        """Whether a pass over these samples has any that are still missing."""
        return not self.refused and self._bytes < _BYTES and any(True for _ in self._missing(sample_ids))

    def see(self, sample_ids: Tensor, clean: Tensor, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep what is missing.

        Args:
            sample_ids: (B,).
            clean: (B, …), of the same rows.
            module, args, kwargs: the denoiser's call.
        """
        conditions = self._conditions(module, args, kwargs, len(clean))
        if self.refused:
            return
        batch = {"latents": clean.detach(), **conditions}
        for row, sample in list(self._missing(sample_ids)):
            item = _to_cpu(take(batch, torch.tensor([row], device=clean.device)))
            self._items[sample] = item
            self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in _tensors(item))
            if self._bytes >= _BYTES:
                return

    def probe(self) -> Probe:
        """Of the samples that are kept by now; further ones join as they come."""
        items = _Kept(self._items)
        return replace(
            self._probe,
            samples=None,
            dataset=items,
            collate=_joined,
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

    def _conditions(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], rows: int
    ) -> dict[str, Any]:
        """The call's further arguments, by name."""
        parameters = list(inspect.signature(module.forward).parameters)
        if getattr(module, "module", module) is not self._model:
            self.refused = f"the trained parts hang in a {type(module).__name__} that is not trained itself"
        elif not set(parameters[1:2]) & set(NAMES):
            self.refused = f"the second argument of {type(module).__name__} is not its timestep"
        given = dict(zip(parameters, args, strict=False)) | dict(kwargs)
        found = {}
        for name, value in given.items():
            if value is None or name in (*_INPUT, *NAMES, *_PASSED_ON) or isinstance(value, bool):
                continue
            if name not in CONDITIONS or any(len(tensor) != rows for tensor in _tensors(value)):
                self.refused = f"the model is given {name!r}, which probes would not know how to make again"
            elif any(tensor.requires_grad for tensor in _tensors(value)):
                self.refused = f"{name!r} comes from a model that is trained itself"
            else:
                found[name] = value
        return found


class _Kept:
    """The items as a dataset."""

    def __init__(self, items: dict[int, Any]) -> None:
        self._items = items
        self.ids = sorted(items)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> Any:
        return self._items[self.ids[position]]


def _joined(items: list[Any]) -> Any:
    """Single-row items as a batch."""
    if isinstance(items[0], Tensor):
        return torch.cat(items)
    return {key: _joined([item[key] for item in items]) for key in items[0]}


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    return {key: _to_cpu(inner) for key, inner in value.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
