"""sd-scripts: as musubi-tuner's batches, with names in its debug mode only, and a weight for each loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.integrations.trainers.musubi import BucketBatchManager, Musubi
from tests.integrations.trainers.trainer import PRIOR_LOSS_WEIGHT, File
from tests.runs import SCHEDULER


class BaseDataset(BucketBatchManager):
    def __init__(self, buckets: list[list[File]], debug_dataset: bool = False) -> None:
        self.debug_dataset = debug_dataset
        self.image_data = {file.path: file for bucket in buckets for file in bucket}
        super().__init__(buckets)

    def of(self, own: list[File]) -> dict[str, Any]:
        weights = [PRIOR_LOSS_WEIGHT if file.is_reg else 1.0 for file in own]
        example = {
            "loss_weights": torch.tensor(weights),
            "captions": [file.caption for file in own],
            "images": None,
            "latents": torch.stack([file.latent for file in own]),
            "flippeds": [False] * len(own),
        }
        if self.debug_dataset:
            example["image_keys"] = [file.path for file in own]
        return example


class Kohya(Musubi):
    manager = BaseDataset
    files: ClassVar = {
        "library/train_util.py": """
            from tests.integrations.trainers import kohya
            class BaseDataset(kohya.BaseDataset):
                pass
        """,
        "sdxl_train_network.py": """
            from library.train_util import BaseDataset
            from tests.integrations.trainers.kohya import Kohya
            Kohya.main(manager=BaseDataset)
        """,
    }

    def inputs(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        latents = batch["latents"]
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        return SCHEDULER.add_noise(latents, noise, timesteps), timesteps, noise, batch["loss_weights"]
