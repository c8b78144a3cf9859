"""Snapshots: the trainable parameters at a step, kept although a script rotates its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zarr.abc.store import Store

from diffhook.errors import LogError
from diffhook.log import store as files

_ROOT = "snapshots"


@dataclass(frozen=True)
class Snapshot:
    """One snapshot, its parameters not yet read.

    Attributes:
        step: optimiser steps taken.
        lr: learning rate of the last of them.
        lr_sum: sum of the learning rates of the steps since the snapshot before.
        details: whatever else the writer recorded.
    """

    step: int
    lr: float
    lr_sum: float
    session: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)
    store: Store | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> str:
        return f"{_ROOT}/step-{self.step:08d}"

    def parameters(self) -> bytes:
        """The parameters as a safetensors file's content.

        Raises:
            LogError: the file is gone.
        """
        assert self.store is not None
        content = files.get(self.store, f"{self.key}/parameters.safetensors")
        if content is None:
            raise LogError(f"{files.describe(self.store)}: {self.key} has lost its parameters")
        return content


def write_snapshot(store: Store, snapshot: Snapshot, parameters: bytes) -> None:
    """Write parameters, then the description: a snapshot without it does not exist."""
    files.put(store, f"{snapshot.key}/parameters.safetensors", parameters)
    description = {
        "step": snapshot.step,
        "lr": snapshot.lr,
        "lr_sum": snapshot.lr_sum,
        "session": snapshot.session,
        **snapshot.details,
    }
    files.put(store, f"{snapshot.key}/snapshot.json", json.dumps(description, indent=1).encode())


def read_snapshots(store: Store, starts: list[int]) -> list[Snapshot]:
    """All committed snapshots that no later session supersedes, by step.

    Args:
        starts: the step at which each session began.
    """
    found = []
    for name in files.names(store, _ROOT):
        content = files.get(store, f"{_ROOT}/{name}/snapshot.json")
        if content is None:
            continue
        try:
            fields = json.loads(content)
            known = {k: fields.pop(k) for k in ("step", "lr", "lr_sum", "session")}
            snapshot = Snapshot(**known, details=fields, store=store)
        except (ValueError, KeyError, TypeError) as error:
            raise LogError(f"{files.describe(store)}: {name}/snapshot.json: {error}") from error
        later = starts[snapshot.session + 1 :]
        if not later or snapshot.step <= min(later):
            found.append(snapshot)
    return sorted(found, key=lambda s: s.step)
