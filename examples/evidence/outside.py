"""TracIn and ReTrac of the same snapshots, noise and timestep by dattri: an outside check of our scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from experiment import Result
from sources import Samples
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from training import LOSS, NOISING, make_model, train

import diffhook
from diffhook.capture.objective.noise import noise_bank, noise_seed

if TYPE_CHECKING:
    from retraining import Problem

_TRAINING, _QUERIES, _TIMESTEP = 24, 8, 400


def against_dattri(problem: Problem, path: Path) -> Result:
    """Largest difference between our exact scores and dattri's, relative to its largest score.

    At one timestep with one draw of noise, where ReTrac is TracIn of normalised gradients.
    """
    grid = diffhook.Grid([_TIMESTEP])
    probe = diffhook.Probe(samples=list(range(_TRAINING)), grid=grid, label_timesteps=0)
    train(
        problem.training, problem.recipe, seed=0, log=path, objective=LOSS, probe=probe,
        projection_dim="full", every=10**9,
    )  # fmt: skip
    log = diffhook.open_log(path)
    asked = problem.asked.take(range(_QUERIES))
    model = make_model(problem.training, problem.recipe)
    diffhook.query(log, asked.batch(), "asked", LOSS, model=model, grid=grid, overwrite=True)
    found: Result = {"pairs": _TRAINING * _QUERIES}
    for method, normalised in (("tracin", False), ("retrac", True)):
        ours = diffhook.influence(log, "asked", method, "probe").values
        theirs = dattri_scores(problem, log, asked, normalised)
        if theirs is None:
            return {**found, "note": "dattri is not installed"}
        found[method] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return found


def dattri_scores(problem: Problem, log: diffhook.RunLog, asked: Samples, normalised: bool) -> Any:
    """(Q, N) by dattri; None where it is not installed."""
    try:
        from dattri.algorithm.tracin import TracInAttributor
        from dattri.task import AttributionTask
    except ImportError:
        return None
    model = make_model(problem.training, problem.recipe).eval()

    def loss(parameters: dict[str, Tensor], sample: tuple[Tensor, ...]) -> Tensor:
        noisy, noise, *labels = (value[None] for value in sample)
        at = torch.tensor([_TIMESTEP])
        predicted = torch.func.functional_call(model, parameters, (noisy, at, *labels)).sample
        return (predicted - noise).square().mean()

    share = problem.recipe.batch / len(problem.training)
    task = AttributionTask(
        loss, model, [safetensors.torch.load(snapshot.parameters()) for snapshot in log.snapshots]
    )
    weights = torch.tensor([snapshot.lr_sum * share for snapshot in log.snapshots])
    attributor = TracInAttributor(task, weights, normalised)
    attributor.projector_kwargs = None  # whole gradients
    first = problem.training.take(range(_TRAINING))
    return attributor.attribute(noised(first), noised(asked)).numpy().T


def noised(samples: Samples) -> DataLoader[Any]:
    """Batches of (noisy images, noise, labels if any), with the noise that our grid draws."""
    clean, *labels = samples.batch().values()
    noise = noise_bank(torch.full((len(clean),), noise_seed(0, _TIMESTEP, 0)), clean, 0.0)
    noisy = NOISING.add_noise(clean, noise, torch.full((len(clean),), _TIMESTEP))
    return DataLoader(TensorDataset(noisy, noise, *labels), batch_size=8)
