"""What a query set asks: whose gradients, of what scalar, at which timesteps and snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffhook.capture.checkpoints.snapshots import load_snapshot
from diffhook.capture.model.adapter import describe_adapters
from diffhook.capture.model.refusal import refused
from diffhook.capture.objective import Objective
from diffhook.capture.probes.grid import Grid, measure, to_device
from diffhook.gradients import PerSampleGradients
from diffhook.log import Rows, Snapshot
from diffhook.log.schema import json_like
from diffhook.queries.digest import digest
from diffhook.queries.rebuilt import load_preconditioner


@dataclass(frozen=True)
class QueryPart:
    """Samples that are measured on the same timesteps.

    Attributes:
        batch: the collated samples.
        ids: of the queries that they are of.
        grid: the timesteps; noise as the whole question's grid has it.
        weight: of its rows together; of a query the weights add up to 1.
    """

    batch: Any
    ids: list[int]
    grid: Grid
    weight: float = 1.0


@dataclass(frozen=True)
class Question:
    """Whose gradients are asked for, of what scalar, where, and against which kinds of rows."""

    parts: list[QueryPart]
    objective: Objective
    model: nn.Module
    grid: Grid
    kinds: list[str]
    snapshots: list[Snapshot]
    preconditioned: bool | str

    @property
    def rows(self) -> int:
        """Of all snapshots."""
        each = sum(len(part.ids) * part.grid.rows for part in self.parts)
        return len(self.snapshots) * len(self.kinds) * each

    def describe(self, details: Mapping[str, Any]) -> dict[str, Any]:
        """As JSON, for the log."""
        return {
            "objective": json_like(self.objective.describe()),
            "grid": self.grid.describe(),
            "against": self.kinds,
            "snapshots": self._steps,
            "samples": json_like(details),
            "preconditioned": self.preconditioned,
            "digest": self._digest(),
        }

    @property
    def _steps(self) -> list[list[int]]:
        return [[snapshot.step, snapshot.session] for snapshot in self.snapshots]

    def _digest(self) -> str | None:
        """None where the description of the objective does not say all that it does."""
        if not self.objective.self_contained:
            return None
        trained = (self.model, describe_adapters(self.model))  # an adapter's scale is no parameter
        divided = ["preconditioned", self.preconditioned] if self.preconditioned else []
        parts = [[part.batch, part.ids, part.grid.describe(), part.weight] for part in self.parts]
        asked = (parts, self.objective.describe(), *trained, self.grid.describe())
        return digest(*asked, self.kinds, self._steps, *divided)

    def measured(self, engine: PerSampleGradients, batch_size: int) -> Iterator[Rows]:
        """Rows, snapshot by snapshot."""
        device = next(engine.model.parameters()).device
        for snapshot in self.snapshots:
            load_snapshot(engine, snapshot)
            if self.preconditioned:
                load_preconditioner(engine, snapshot, root=self.preconditioned == "root")
            options: dict[str, Any] = {"step": snapshot.step, "lr": snapshot.lr_sum, "batch_size": batch_size}
            for kind in self.kinds:
                options["own_noise"] = kind == "train"
                for part in self.parts:
                    batch = to_device(part.batch, device)
                    with refused(f"the model cannot take these queries ({json_like(_shapes(batch))})"):
                        yield from measure(
                            engine, self.objective, batch, part.ids, part.grid, weight=part.weight, **options
                        )


def _shapes(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return f"shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return {key: _shapes(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_shapes(value) for value in batch]
    return type(batch).__name__
