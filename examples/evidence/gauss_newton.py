"""Influence by the projected Gauss–Newton matrix: the nearest to EK-FAC that a flat projection allows.

K = P G Pᵀ is estimated by gradients of random outputs: the sum of the model's outputs with random signs,
scaled so that over signs the outer product of its gradient has as its mean the Gauss–Newton matrix of the
loss, JᵀJ · 2 w/d for d outputs and a loss of weight w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from training import LOSS, make_model

import diffhook
from diffhook.analysis.directions import query_directions
from diffhook.analysis.methods import find_method
from diffhook.analysis.methods.whitening import blocks, whitened
from diffhook.capture.objective import Objective
from diffhook.capture.objective.noise import noise_bank, noise_seed
from diffhook.log import Table

if TYPE_CHECKING:
    from retraining import Problem

_RIDGE = 0.1  # λ over the mean eigenvalue of K; on the UNet .01 and .3 did as well
_ROWS = "training-random-output"


@dataclass(frozen=True)
class RandomOutput(Objective):
    """An objective that gives random outputs in place of the loss; its signs depend on the noise's seed."""

    objective: diffhook.DiffusionObjective

    @property
    def num_timesteps(self) -> int:
        return self.objective.num_timesteps

    def __call__(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Tensor:
        predicted = self.objective.predict(model, batch, timesteps, noise_seeds)
        output = predicted.output.flatten(1)
        scale = (2 * predicted.weights / output.shape[1]).sqrt()
        return scale * (signs(noise_seeds, output) * output).sum(1)

    def describe(self) -> dict[str, Any]:
        return {**self.objective.describe(), "measurement": "random-output"}


def signs(noise_seeds: Tensor, like: Tensor) -> Tensor:
    """(B, d) of 1 and −1, independent of the noise that has the same seeds.

    Args:
        noise_seeds: (B,) int64.
        like: (B, d) whose shape, dtype and device to take.
    """
    seeds = torch.tensor([noise_seed(seed, 0.0, 0) for seed in noise_seeds.tolist()])
    return torch.where(noise_bank(seeds, like) < 0, -1.0, 1.0).to(like)


def gauss_newton_scores(
    problem: Problem, log: diffhook.RunLog, queries: str, *, unit: bool
) -> npt.NDArray[np.float64]:
    """(Q, N): the mean over snapshots of φ_q (K + λI)⁻¹ φ_i, of loss gradients on the probes' grid.

    Args:
        queries: name of a query set on the grid.
        unit: whether φ are means of directions, as ReTrac's.
    """
    rows = random_outputs(problem, log)
    method = find_method("retrac" if unit else "tracin")
    asked, own = (
        query_directions(table, method, own_noise=False)
        for table in (log.refresh().queries[queries], log.probe)
    )
    total = np.zeros((len(asked.query_ids), len(own.query_ids)))
    for k, step in enumerate(asked.steps):
        mine = rows["step"] == step
        gradients = rows["projection"][mine].astype(np.float64) * rows["grad_norm"][mine, None]
        parts = [gradients[:, part] for part in blocks(gradients.shape[1])]
        matrix = [part.T @ part / len(part) for part in parts]
        total += whitened(asked.whole[k, 0], matrix, _RIDGE) @ own.whole[k, 0].T / len(asked.steps)
    return total


def random_outputs(problem: Problem, log: diffhook.RunLog) -> Table:
    """Their gradients, kept in the log. Each row has noise and signs of its own, so that it tells K something
    new."""
    if _ROWS not in log.refresh().queries:
        diffhook.query(
            log, problem.training.batch(), _ROWS, RandomOutput(LOSS), batch_size=64, against="train",
            model=make_model(problem.training, problem.recipe), grid=_twice(problem.grid),
        )  # fmt: skip
    return log.refresh().queries[_ROWS]


def _twice(grid: diffhook.Grid) -> diffhook.Grid:
    """Draws as rows of their own: averaged before, they would tell less."""
    return diffhook.Grid(grid.timesteps, replicates=grid.draws)
