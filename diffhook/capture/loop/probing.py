"""Probes of the training's own samples, under the ids that the training rows have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffhook.capture import Objective, Probe
from diffhook.capture.loop.identity import Identity
from diffhook.errors import ConfigurationError


def training_probe(
    probe: Probe | None, objective: Objective | None, loader: Any, identity: Identity
) -> Probe | None:
    """The probe over the training's dataset, if it names none itself; None without an objective.

    Raises:
        ConfigurationError: no dataset is known.
    """
    if objective is None:
        return None
    probe = probe or Probe()
    dataset = None
    if probe.dataset is None:
        dataset = identity.dataset  # of the first training batch
        if loader is None or not hasattr(loader.dataset, "__getitem__"):
            raise ConfigurationError(
                "the probe has no dataset, and no DataLoader over one was prepared: pass "
                "probe=Probe(dataset=...)"
            )
        probe = replace(probe, dataset=loader.dataset, collate=probe.collate or loader.collate_fn)

    def identify(batch: Any, indices: Sequence[int]) -> list[int]:
        found = identity.of(batch, torch.tensor(indices), dataset)
        return list(indices) if found is None else found.tolist()

    return replace(probe, identify=identify)
