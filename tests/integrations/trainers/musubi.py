"""musubi-tuner: batches made by the dataset, without names, reshuffled by the collation."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tests.integrations.trainers.trainer import BATCH, File, Trainer, files, names_of


class BucketBatchManager:
    def __init__(self, buckets: list[list[File]]) -> None:
        self.buckets, self.batch_size = dict(enumerate(buckets)), BATCH
        self.bucket_batch_indices = [
            (key, i) for key in self.buckets for i in range(len(buckets[0]) // BATCH)
        ]

    def shuffle(self) -> None:
        for bucket in self.buckets.values():
            random.shuffle(bucket)
        random.shuffle(self.bucket_batch_indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, number = self.bucket_batch_indices[index]
        own = self.buckets[key][number * BATCH : (number + 1) * BATCH]
        return self.of(own)

    def of(self, own: list[File]) -> dict[str, Any]:
        return {"latents": torch.stack([item.latent for item in own]), "timesteps": None}


class _Managed(Dataset[Any]):
    def __init__(self, manager: BucketBatchManager) -> None:
        self.manager, self.current_epoch = manager, -1

    def __len__(self) -> int:
        return len(self.manager.bucket_batch_indices)

    def __getitem__(self, index: int) -> Any:
        return self.manager[index]

    def set_current_epoch(self, epoch: int) -> None:
        while self.current_epoch < epoch:
            self.current_epoch += 1
            random.seed(self.current_epoch)
            self.manager.shuffle()


class _Collator:
    """Where a new epoch is told to the dataset, in a worker perhaps: after its first batch was made."""

    def __init__(self, epoch: Any, dataset: _Managed) -> None:
        self.epoch, self.dataset = epoch, dataset

    def __call__(self, examples: list[Any]) -> Any:
        worker = get_worker_info()
        dataset: Any = self.dataset if worker is None else worker.dataset
        dataset.set_current_epoch(self.epoch.value)
        return examples[0]


class Musubi(Trainer):
    manager: Callable[..., BucketBatchManager] = BucketBatchManager
    files: ClassVar = {
        "musubi_tuner/dataset/image_video_dataset.py": """
            from tests.integrations.trainers import musubi
            class BucketBatchManager(musubi.BucketBatchManager):
                pass
        """,
        "qwen_image_train_network.py": """
            from musubi_tuner.dataset.image_video_dataset import BucketBatchManager
            from tests.integrations.trainers.musubi import Musubi
            Musubi.main(manager=BucketBatchManager)
        """,
    }

    def set_up(self, checkpoint: Path | None) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.dataset = _Managed(self.manager(files()))
        self.unet = self.accelerator.prepare(self.unet)
        self.current_epoch = multiprocessing.Value("i", -1)
        loader: Any = DataLoader(
            self.dataset,
            batch_size=1,
            shuffle=True,
            collate_fn=_Collator(self.current_epoch, self.dataset),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
        rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.trained, self.optimizer, self.loader, rates = self.accelerator.prepare(
            self.trained, self.optimizer, loader, rates
        )
        self.unet.eval()
        if checkpoint is not None:
            self.dataset.set_current_epoch(0)
            self.accelerator.load_state(str(checkpoint))

    def epoch(self, number: int) -> None:
        self.current_epoch.value = number  # type: ignore[attr-defined]
        for batch in self.loader:
            inputs = self.inputs(batch)
            with self.accelerator.accumulate(self.trained):
                self.note(names_of(batch["latents"]), *inputs)
                self.accelerator.backward(self.losses(*inputs).mean())
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1

    def inputs(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Of the losses: flow matching, with times from 1 to 1000."""
        latents = batch["latents"]
        noise, t = torch.randn_like(latents), torch.rand(len(latents))
        share = t[:, None, None, None]
        return (1 - share) * latents + share * noise, t * 1000 + 1, noise - latents

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def end(self) -> None:
        self.accelerator.end_training()
