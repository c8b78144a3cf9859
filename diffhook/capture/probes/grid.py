"""A sparse grid of timesteps with noise draws at each, and the gradients of samples on it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffhook.capture.checks import check_whole
from diffhook.capture.objective import Objective
from diffhook.capture.objective.noise import noise_seed
from diffhook.capture.rows import make_rows
from diffhook.errors import ConfigurationError, RecheckNeeded
from diffhook.gradients import PerSampleGradients
from diffhook.log import Rows
from diffhook.words import brief


@dataclass(frozen=True)
class Grid:
    """S timesteps, evenly spaced in [1, T − 1] as in the paper's code, with R replicates of M noise draws.

    A row is the gradient averaged over the M draws of one replicate; R rows of a sample and timestep tell
    how far the noise moves it. Draw m of replicate r at timestep t has the seed
    ``noise_seed(seed, t, r · M + m)``, the same for all samples: what is set against each other on the grid
    shares its noise draw by draw. Queries that are set against training events, each of which drew noise of
    its own, have ``noise_seed(seed, t, r · M + m, query)`` in its place; see
    :func:`~diffhook.capture.objective.noise.noise_seed`.

    Attributes:
        timesteps: S, or the timesteps themselves.
        draws: M.
        seed: of the noise.
        replicates: R.
    """

    timesteps: int | Sequence[float] = 10
    draws: int = 1
    seed: int = 0
    replicates: int = 1

    def __post_init__(self) -> None:
        for name in ("draws", "replicates"):
            check_whole(name, getattr(self, name))
        if isinstance(self.timesteps, str) or not (
            isinstance(self.timesteps, int) or hasattr(self.timesteps, "__len__")
        ):
            raise ConfigurationError(
                f"timesteps is {brief(self.timesteps)}; expected how many, or a list of them"
            )
        if min(self.count, self.draws, self.replicates) < 1:
            raise ConfigurationError(
                f"a grid of {self.count} timesteps × {self.draws} draws × {self.replicates} replicates; "
                "expected at least 1 × 1 × 1"
            )

    @property
    def count(self) -> int:
        """S."""
        return self.timesteps if isinstance(self.timesteps, int) else len(self.timesteps)

    @property
    def rows(self) -> int:
        """Rows of one sample, S · R."""
        return self.count * self.replicates

    def seeds(self, timestep: float, replicate: int, sample: int | None = None) -> list[int]:
        """(M,) seeds of a row's draws; with ``sample``, of its own."""
        first = replicate * self.draws
        return [noise_seed(self.seed, timestep, first + draw, sample) for draw in range(self.draws)]

    def steps(self, num_timesteps: int) -> list[Any]:
        """The timesteps for a scheduler with T of them.

        Raises:
            ConfigurationError: a timestep outside [0, T).
        """
        if isinstance(self.timesteps, int):
            if self.timesteps >= num_timesteps:
                raise ConfigurationError(
                    f"a grid of {self.timesteps} timesteps; the schedule has {num_timesteps}, from 0 on"
                )
            if self.timesteps == 1:
                return [num_timesteps // 2]
            return np.linspace(1, num_timesteps - 1, self.timesteps).round().astype(int).tolist()
        steps = [int(t) if float(t).is_integer() else float(t) for t in self.timesteps]
        if min(steps) < 0 or max(steps) >= num_timesteps:
            raise ConfigurationError(f"timesteps {steps} are not all within [0, {num_timesteps})")
        return steps

    def timesteps_of(self, objective: Objective) -> list[Any]:
        """The timesteps for an objective: named ones as they are, others spaced on its schedule."""
        steps = self.steps(objective.num_timesteps)
        return objective.schedule(steps) if isinstance(self.timesteps, int) else steps

    def describe(self) -> dict[str, Any]:
        """As JSON; ``Grid(**description)`` is the same grid."""
        steps = self.timesteps if isinstance(self.timesteps, int) else list(self.timesteps)
        return {**asdict(self), "timesteps": steps}


def measure(
    engine: PerSampleGradients,
    objective: Objective,
    batch: Any,
    sample_ids: Sequence[int],
    grid: Grid,
    *,
    step: int,
    lr: float,
    weight: float,
    own_noise: bool = False,
    batch_size: int = 32,
    done: Container[tuple[int, int]] = (),
) -> Iterator[Rows]:
    """Gradients of samples at every timestep of a grid; noise draws are averaged before norms.

    Args:
        engine: on the model, with ``group_size`` equal to ``grid.draws``.
        batch: the collated samples, on the model's device; tensors with the sample axis in front,
            in dicts, lists or tuples.
        sample_ids: their ids.
        step, lr, weight: what to write in these columns; weight is divided by S · R here.
        own_noise: each sample has noise of its own; by default all share the grid's.
        batch_size: rows of one forward pass, at least ``grid.draws``.
        done: (sample id, noise seed of the row) of rows that are not asked for.

    Yields:
        Rows, one per (sample, timestep, replicate), in chunks.
    """
    every = (
        _Cell(i, t, r, grid.seeds(t, r, sample_ids[i] if own_noise else None))
        for t in grid.timesteps_of(objective)
        for r in range(grid.replicates)
        for i in range(len(sample_ids))
    )
    cells = [cell for cell in every if (sample_ids[cell.position], cell.seeds[0]) not in done]
    size = max(batch_size // grid.draws, 1)
    for start in range(0, len(cells), size):
        part = cells[start : start + size]
        losses = _checked_pass(engine, objective, batch, part, grid.draws)
        count = len(part)
        yield make_rows(
            engine,
            sample=np.array([sample_ids[cell.position] for cell in part]),
            step=np.full(count, step),
            timestep=np.array([cell.timestep for cell in part]),
            noise_seed=np.array([cell.seeds[0] for cell in part]),
            replicate=np.array([cell.replicate for cell in part]),
            own_noise=np.full(count, own_noise),
            lr=np.full(count, lr),
            loss=losses.detach().float().view(count, grid.draws).mean(1).cpu().numpy(),
            weight=np.full(count, weight / grid.rows),
        )


class _Cell(NamedTuple):
    """What becomes one row."""

    position: int  # of the sample in the batch
    timestep: Any
    replicate: int
    seeds: list[int]


def _checked_pass(
    engine: PerSampleGradients, objective: Objective, batch: Any, cells: Sequence[_Cell], draws: int
) -> Tensor:
    """A pass, again where it is discarded: the engine bounds how often in a row that happens."""
    while True:
        with suppress(RecheckNeeded):
            return _pass(engine, objective, batch, cells, draws)


def _pass(
    engine: PerSampleGradients, objective: Objective, batch: Any, cells: Sequence[_Cell], draws: int
) -> Tensor:
    device = next(engine.model.parameters()).device
    index = torch.tensor([cell.position for cell in cells]).repeat_interleave(draws)
    timesteps = torch.tensor([cell.timestep for cell in cells]).repeat_interleave(draws)
    seeds = torch.tensor([seed for cell in cells for seed in cell.seeds])
    try:
        with engine:
            losses = objective(engine.model, take(batch, index.to(device)), timesteps.to(device), seeds)
            losses.mean().backward()
    except BaseException:
        engine.detach()  # where leaving it is what has failed
        raise
    return losses


def take(batch: Any, index: Tensor) -> Any:
    """The given rows of every tensor in a nested batch."""
    if isinstance(batch, Tensor):
        return batch[index]
    if isinstance(batch, Mapping):
        return _like(batch, {key: take(value, index) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        taken = [take(value, index) for value in batch]
        if len(taken) and not isinstance(batch[0], Tensor | Mapping | tuple | list):
            return [batch[i] for i in index.tolist()]
        return _like(batch, taken)
    return batch


def _like(batch: Any, values: Any) -> Any:
    """A dict, other mapping, list, tuple or named tuple as ``batch`` is one."""
    if isinstance(batch, dict):
        return values
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of a nested batch on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return _like(batch, {key: to_device(value, device) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        return _like(batch, [to_device(value, device) for value in batch])
    return batch
