"""Training gradients as the paper takes them: at each snapshot, of every sample, with a draw of its own.

A watched training logs a sample's gradient at the step that saw it. Rows of one step then share what the
model's parameters were at it, which no query at a snapshot can share with them. In arXiv 2401.09031 all
gradients are of the checkpoints: each sample's at a timestep and with noise drawn for it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from sources import Samples
from torch import Tensor, nn
from training import NOISING

import diffhook
from diffhook.capture.objective import Prediction
from diffhook.capture.objective.noise import noise_seed
from diffhook.capture.probes.grid import measure
from diffhook.gradients import PerSampleGradients
from diffhook.log import LogWriter, Rows


class Drawn(diffhook.DiffusionObjective):
    """The loss at a timestep that the noise's seed draws, in place of the grid's."""

    def predict(self, model: nn.Module, batch: Any, timesteps: Tensor, noise_seeds: Tensor) -> Prediction:
        return super().predict(model, batch, drawn_timesteps(noise_seeds).to(timesteps), noise_seeds)


def drawn_timesteps(noise_seeds: Tensor) -> Tensor:
    """(B,) int64, uniform over the schedule's, independent of the noise that has the same seeds."""
    drawn = [noise_seed(seed, 0.0, 0) % len(NOISING.timesteps) for seed in noise_seeds.tolist()]
    return torch.tensor(drawn)


def replayed(
    log: diffhook.RunLog,
    training: Samples,
    model: nn.Module,
    path: Path,
    draws: int = 1,
    last: int | None = None,
) -> diffhook.RunLog:
    """A log with the snapshots and the queries of another, whose events are replayed at the snapshots.

    Args:
        training: the samples of the log, by their ids.
        model: as it was trained; it ends as the last snapshot.
        draws: events of each sample at each snapshot.
        last: replays at so many of the last snapshots alone; None: at all.
    """
    shutil.rmtree(path, ignore_errors=True)
    projection = log.config["identity"]["projection"]
    engine = PerSampleGradients(
        model, projection_dim=projection["dim"], seed=projection["seed"], weight_gradients=False
    )
    writer = LogWriter(path, log.config, strict=True)
    for number, snapshot in enumerate(log.snapshots):
        parameters = snapshot.parameters()
        writer.snapshot(snapshot, parameters)
        if last is not None and number < len(log.snapshots) - last:
            continue
        model.load_state_dict(safetensors.torch.load(parameters))
        grid = diffhook.Grid(1, replicates=draws, seed=number)
        rows = measure(
            engine, Drawn(NOISING), training.batch(), range(len(training)), grid,
            step=snapshot.step, lr=snapshot.lr_sum, weight=1.0, own_noise=True, batch_size=64,
        )  # fmt: skip
        for each in rows:
            writer.put("train", _as_events(each))
    writer.close()
    shutil.copytree(Path(str(log.location)) / "queries", path / "queries", dirs_exist_ok=True)
    return diffhook.open_log(path)


def _as_events(rows: Rows) -> Rows:
    """As a training loop would have written them."""
    count = len(rows["sample"])
    return {
        **rows,
        "timestep": drawn_timesteps(torch.from_numpy(rows["noise_seed"])).numpy(),
        "replicate": np.zeros(count, np.int16),
        "own_noise": np.zeros(count, np.int8),
    }
