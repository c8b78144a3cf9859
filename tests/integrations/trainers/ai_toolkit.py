"""ai-toolkit: a loader that is not prepared, batches that are objects, several fetched ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from tests.integrations.trainers.trainer import BATCH, File, Trainer, files
from tests.runs import SCHEDULER


class _Bucketed(Dataset[Any]):
    """Makes batches itself; the loader joins nothing."""

    def __init__(self, bucket: list[File]) -> None:
        self.bucket = bucket

    def __len__(self) -> int:
        return len(self.bucket) // BATCH

    def __getitem__(self, index: int) -> list[File]:
        return self.bucket[index * BATCH : (index + 1) * BATCH]


class _Transfer:
    """A batch that is no mapping."""

    def __init__(self, file_items: list[File]) -> None:
        self.file_items = file_items
        self.tensor: Tensor | None = None
        self.latents = torch.cat([item.latent.unsqueeze(0) for item in file_items])


class AiToolkit(Trainer):
    files: ClassVar = {
        "run.py": """
            from tests.integrations.trainers.ai_toolkit import AiToolkit
            AiToolkit.main()
        """
    }

    def set_up(self, checkpoint: Path | None) -> None:
        self.accelerator = Accelerator(cpu=True)
        if checkpoint is not None:
            saved = torch.load(checkpoint / "optimizer.pt")
            self.trained.load_state_dict(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.steps = saved["step"]
        self.accelerator.prepare(self.unet)
        self.accelerator.prepare(self.trained)
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.loader: Any = DataLoader(
            ConcatDataset([_Bucketed(bucket) for bucket in files()]),
            batch_size=None,
            shuffle=True,
            collate_fn=_Transfer,
        )

    def epoch(self, number: int) -> None:
        batches = iter(self.loader)
        for _ in range(2):
            together = [next(batches), next(batches)]  # gradient_accumulation: 2
            with self.accelerator.accumulate([self.unet, self.trained]):
                self.optimizer.zero_grad()
                for batch in together:
                    self.accelerate(batch)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1

    def accelerate(self, batch: _Transfer) -> None:
        latents = batch.latents.to(dtype=torch.float32)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),))
        weight = torch.tensor([item.loss_multiplier for item in batch.file_items]).mean()
        inputs = SCHEDULER.add_noise(latents, noise, timesteps), timesteps, noise
        self.note([item.path for item in batch.file_items], *inputs)
        self.accelerator.backward(self.losses(*inputs).mean() * weight)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        state = {"weights": self.trained.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": self.steps}, folder / "optimizer.pt")

    def end(self) -> None:
        self.accelerator.end_training()
