"""Probes: chosen training samples on a grid of timesteps, at every snapshot."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from diffhook.appearance import COLUMNS
from diffhook.capture.checks import check_kind, check_whole
from diffhook.capture.model.borrowing import undisturbed
from diffhook.capture.objective import Objective
from diffhook.capture.probes.grid import Grid, measure, to_device
from diffhook.capture.probes.label_contrast import REFERENCE, LabelContrasts, spaced
from diffhook.capture.samples.appearance import appearance, images_of
from diffhook.errors import ConfigurationError
from diffhook.gradients import PerSampleGradients
from diffhook.log import Rows
from diffhook.words import brief


@dataclass(frozen=True)
class Probe:
    """Which samples to probe, and on which grid.

    Attributes:
        samples: dataset indices; or how many, evenly spaced through the dataset, or of samples that are taken
            from the training's own calls about so many, chosen by a hash of their ids; None for all.
        grid: timesteps and noise; by default 10 timesteps with two replicates, a row of each, so that scores
            have errors.
        batch_size: rows of one forward pass.
        label_timesteps: of a model that is told classes or captions, at how many timesteps each sample's
            loss under its own is set against that under others, to find wrong ones; 0: not at all. See
            :mod:`diffhook.capture.probes.label_contrast`.
        dataset: the dataset, if not that of the training's DataLoader.
        collate: how its items become a batch, likewise.
        identify: (batch, dataset indices) → sample ids, where these differ from the indices.
        names: what several processes call the dataset's samples when they share them; None: their indices.
        population: how many samples the training has, where the dataset holds but some of them.
    """

    samples: Sequence[int] | int | None = 512
    grid: Grid = field(default_factory=lambda: Grid(10, replicates=2))
    batch_size: int = 32
    label_timesteps: int = 6
    dataset: Any = None
    collate: Callable[[list[Any]], Any] | None = None
    identify: Callable[[Any, Sequence[int]], Sequence[int]] | None = None
    names: Sequence[int] | None = None
    population: int | None = None

    def __post_init__(self) -> None:
        check_kind("grid", self.grid, Grid, "Grid(10, replicates=2)")
        check_whole("batch_size", self.batch_size, 1)
        check_whole("label_timesteps", self.label_timesteps, 0)
        if isinstance(self.samples, str | float) or (isinstance(self.samples, int) and self.samples < 1):
            raise ConfigurationError(
                f"samples is {brief(self.samples)}; expected how many, from 1 on, or indices, or None for all"
            )

    def ids(self, size: int) -> list[int]:
        """The ids to probe in a dataset of ``size`` samples.

        Raises:
            ConfigurationError: an id outside the dataset.
        """
        if self.samples is None:
            return list(range(size))
        if isinstance(self.samples, int):
            spread = np.linspace(0, size - 1, min(self.samples, size))  # float64: exact for any size
            return spread.round().astype(int).tolist()
        ids = [int(i) for i in self.samples]
        outside = [i for i in ids if not 0 <= i < size]
        if outside:
            raise ConfigurationError(f"probe samples {outside[:5]} are not in the dataset of {size} samples")
        return ids

    def run(
        self,
        engine: PerSampleGradients,
        objective: Objective,
        samples: Sequence[int],
        contrasts: LabelContrasts | None,
        *,
        step: int,
        lr_sum: float,
        batch_per_step: int,
        done: Container[tuple[int, int]] = (),
    ) -> Iterator[Rows]:
        """Rows of some samples. Weight: batch/N per unit of summed learning rate, over S.

        The model comes back in its mode, with its gradients, and no random state is touched.

        Args:
            samples: indices in the dataset, of :meth:`ids`.
            contrasts: of :meth:`contrasts`.
            done: see :func:`~diffhook.capture.probes.grid.measure`.
        """
        model: nn.Module = engine.model
        weight = batch_per_step / (self.population or len(self.dataset))
        where: dict[str, Any] = {"step": step, "lr": lr_sum, "weight": weight, "batch_size": self.batch_size}
        with undisturbed(model):
            for ids, batch in self._batches(samples, next(model.parameters()).device):
                known = _of_samples(batch, ids, contrasts)
                for rows in measure(engine, objective, batch, ids, self.grid, done=done, **where):
                    place = [known["sample"].index(i) for i in rows["sample"].tolist()]
                    yield {**rows, **{name: known[name][place] for name in known if name != "sample"}}

    def first_losses(self, model: nn.Module, objective: Objective) -> Tensor:
        """(1,) loss of the first sample, at the first of the grid's timesteps: whether it can be measured."""
        device = next(model.parameters()).device
        _, batch = next(self._batches(self.ids(len(self.dataset))[:1], device))
        timestep = self.grid.timesteps_of(objective)[0]
        seeds = torch.tensor(self.grid.seeds(timestep, 0)[:1])
        return objective(model, batch, torch.tensor([timestep], device=device), seeds)

    def contrasts(self, model: nn.Module, objective: Objective) -> LabelContrasts | None:
        """What sets samples' losses under their own label against those under others, for the model as it is
        now; within :func:`~diffhook.capture.model.borrowing.undisturbed`."""
        if not self.label_timesteps:
            return None
        ids, device = self.ids(len(self.dataset)), next(model.parameters()).device
        reference = [ids[i] for i in spaced(len(ids), REFERENCE)]
        # At either end of a schedule all labels fit alike: nothing is noised there, or everything.
        timesteps = Grid(self.label_timesteps + 2).timesteps_of(objective)[1:-1]
        grid = Grid(timesteps, seed=self.grid.seed)
        return LabelContrasts.learn(model, objective, lambda: self._batches(reference, device), grid)

    def _batches(self, indices: Sequence[int], device: torch.device) -> Iterator[tuple[Sequence[int], Any]]:
        """Sample ids, and the collated samples."""
        collate = self.collate or default_collate
        for start in range(0, len(indices), self.batch_size):
            part = indices[start : start + self.batch_size]
            batch = to_device(collate([self.dataset[i] for i in part]), device)
            yield part if self.identify is None else self.identify(batch, part), batch


def _of_samples(batch: Any, ids: Sequence[int], contrasts: LabelContrasts | None) -> dict[str, Any]:
    """Column → its value for each sample of a batch, and under "sample" their ids."""
    found: dict[str, Any] = {"sample": list(ids)}
    if contrasts is not None:
        each = contrasts.of(batch, len(ids))
        found["label_contrast"] = np.array([one.contrast for one in each], np.float32)
        found["label"] = np.array([one.own for one in each])
        found["better_label"] = np.array([one.better for one in each])
    clean = images_of(batch)
    if clean is not None and len(clean) == len(ids):
        found |= dict(zip(COLUMNS, appearance(clean).cpu().numpy().T, strict=True))
    return found
