"""sd-scripts: as musubi-tuner's batches, with names in its debug mode only, and a weight for each loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.integrations.trainers.musubi import BucketBatchManager, Musubi
from tests.integrations.trainers.trainer import File
from tests.runs import SCHEDULER


class _DebugDataset(BucketBatchManager):
    """Its debug mode turned on, as the recipe has it."""

    def of(self, own: list[File]) -> dict[str, Any]:
        # One bucket stands for regularisation images.
        weights = [0.5 if file.path.startswith("photos/wide") else 1.0 for file in own]
        return {
            "loss_weights": torch.tensor(weights),
            "captions": ["a photo"] * len(own),
            "images": None,
            "latents": torch.stack([file.latent for file in own]),
            "flippeds": [False] * len(own),
            "image_keys": [file.path for file in own],
        }


class Kohya(Musubi):
    manager = _DebugDataset

    def inputs(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        latents = batch["latents"]
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        return SCHEDULER.add_noise(latents, noise, timesteps), timesteps, noise, batch["loss_weights"]
