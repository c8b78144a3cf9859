"""Probes of the training's own samples, under the ids that the training rows have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import default_collate

from diffhook.capture import Objective, Probe
from diffhook.capture.loop.identity import Identity, RowIds, Unmatched
from diffhook.capture.loop.identity.matching import Items, Order, RowMatch
from diffhook.capture.loop.identity.origin import Origin, at
from diffhook.errors import ConfigurationError


def training_probe(
    probe: Probe | None, objective: Objective | None, loader: Any, identity: Identity
) -> Probe | None:
    """The probe over the training's dataset, if it names none itself; without an objective, as it is.

    Raises:
        ConfigurationError: no dataset is known.
    """
    if objective is None:
        return probe
    probe = probe or Probe()
    dataset = probe.dataset
    if dataset is None:
        if loader is None or not hasattr(loader.dataset, "__getitem__"):
            raise ConfigurationError(
                "the probe has no dataset, and no DataLoader over one was prepared: pass "
                "probe=Probe(dataset=...)"
            )
        dataset = loader.dataset
        probe = replace(probe, dataset=dataset, collate=probe.collate or loader.collate_fn)
    collate = _Matching(probe.collate or default_collate)

    def identify(batch: Any, indices: Sequence[int]) -> list[int]:
        found = identity.of(batch, collate.origin(indices, dataset))
        if isinstance(found, RowIds):
            return found.ids.tolist()
        reason = found.reason if isinstance(found, Unmatched) else "its batches come from no known dataset"
        raise ConfigurationError(f"the probe's samples are not known: {reason}")

    return replace(probe, collate=collate, identify=identify)


class _Matching:
    """Collates, and knows of the last batch which row is which item."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate
        self._order = Order()
        self._last = RowMatch(None)

    def __call__(self, items: list[Any]) -> Any:
        before = Items(items, self._order)
        batch = self._collate(items)
        self._last = before.match(batch)
        return batch

    def origin(self, indices: Sequence[int], dataset: Any) -> Origin:
        """Of the last batch, collated of the items at ``indices``."""
        return at(torch.tensor(indices), self._last, dataset)
