"""Influence by EK-FAC, the Gauss–Newton matrix as Kronecker factors layer by layer, with kronfluence.

Kronfluence takes linear layers and convolutions; what other layers hold (embeddings, norms) is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from sources import Samples
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import NOISING, make_model

import diffhook
from diffhook.capture.objective.noise import noise_bank

if TYPE_CHECKING:
    from retraining import Problem

_BATCH = 512


def ekfac_scores(problem: Problem, log: diffhook.RunLog, path: Path) -> npt.NDArray[np.float64] | None:
    """(Q, N) of all queries: the mean over snapshots of g_q G⁻¹ g_i, of gradients that are means over the
    problem's grid.

    λ is a tenth of a layer's mean eigenvalue, kronfluence's own rule.

    Args:
        path: where kronfluence keeps what it computes; anew at every call.

    Returns:
        None where kronfluence is not installed.
    """
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
    except ImportError:
        return None
    torch.manual_seed(0)  # of the targets that factors are drawn with
    task, asked = _task(), problem.asked
    training, queries = (noised(samples, problem.grid) for samples in (problem.training, asked))
    total = np.zeros((len(asked), len(problem.training)))
    for snapshot in log.snapshots:
        model = make_model(problem.training, problem.recipe).eval()
        model.load_state_dict(safetensors.torch.load(snapshot.parameters()))
        analyzer = Analyzer(
            "ekfac", prepare_model(model, task), task, cpu=True, output_dir=str(path), disable_tqdm=True
        )
        analyzer.fit_all_factors(
            "factors", training, _BATCH, factor_args=FactorArguments("ekfac"), overwrite_output_dir=True
        )
        analyzer.compute_pairwise_scores(
            "scores", "factors", queries, training, _BATCH, _BATCH,
            score_args=ScoreArguments(damping_factor=None), overwrite_output_dir=True,
        )  # fmt: skip
        found = analyzer.load_pairwise_scores("scores")
        cells = problem.grid.count * problem.grid.draws
        pairs = found["all_modules"].double().view(len(asked), cells, len(problem.training), cells)
        total += pairs.mean((1, 3)).numpy() / len(log.snapshots)
    return total


def noised(samples: Samples, grid: diffhook.Grid) -> TensorDataset:
    """(noisy images, noise, timesteps, labels if any), each sample at all timesteps and draws of the grid."""
    timesteps, seeds = [], []
    for timestep in grid.steps(len(NOISING.timesteps)):
        timesteps += [timestep] * grid.draws
        seeds += grid.seeds(timestep, 0)
    cells, count = len(seeds), len(samples)
    clean, *labels = (values.repeat_interleave(cells, 0) for values in samples.batch().values())
    noise = noise_bank(torch.tensor(seeds).repeat(count), clean)
    at = torch.tensor(timesteps).repeat(count)
    return TensorDataset(NOISING.add_noise(clean, noise, at), noise, at, *labels)


def _task() -> Any:
    """What kronfluence differentiates."""
    from kronfluence.task import Task

    class Denoising(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            noisy, noise, timesteps, *labels = batch
            output = model(noisy, timesteps, *labels).sample
            target = output.detach() + torch.randn_like(output) if sample else noise
            return (output - target).square().flatten(1).mean(1).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Denoising()
