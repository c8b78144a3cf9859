"""OneTrainer: no Accelerate, a pipeline of its own, noise by the number of the step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.integrations.trainers.trainer import BATCH, PRIOR_LOSS_WEIGHT, Trainer, files
from tests.runs import SCHEDULER


class _Pipeline(IterableDataset[Any]):
    def __init__(self) -> None:
        self.epoch = 0

    def start_next_epoch(self) -> None:
        self.epoch += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        draws = random.Random(self.epoch)
        batches = []
        for bucket in files():
            mixed = draws.sample(bucket, len(bucket))
            batches += [mixed[start : start + BATCH] for start in range(0, len(mixed), BATCH)]
        draws.shuffle(batches)
        for batch in batches:
            for file in batch:
                weight = PRIOR_LOSS_WEIGHT if file.is_reg else 1.0
                concept = "PRIOR_PREDICTION" if file.is_reg else "STANDARD"
                told = {"loss_weight": weight, "concept_type": concept}
                yield {"image_path": file.path, "latent_image": file.latent, **told}


class _PipelineLoader(DataLoader[Any]):
    def __init__(self, dataset: _Pipeline) -> None:
        super().__init__(dataset, batch_size=BATCH, drop_last=True)


class OneTrainer(Trainer):
    accumulation = 2
    fused_back_pass = False
    files: ClassVar = {
        "modules/trainer/GenericTrainer.py": """
            from tests.integrations.trainers.onetrainer import OneTrainer
            class GenericTrainer(OneTrainer):
                pass
            def create_grad_scaler():
                raise RuntimeError("it trains in float32")
        """,
        "scripts/train.py": """
            from modules.trainer.GenericTrainer import GenericTrainer
            GenericTrainer.main()
        """,
    }

    def set_up(self, checkpoint: Path | None) -> None:
        self.loader = _PipelineLoader(_Pipeline())
        self.data_loader = SimpleNamespace(get_data_loader=lambda: self.loader)
        self.config = SimpleNamespace(optimizer=SimpleNamespace(fused_back_pass=self.fused_back_pass))
        for number, low in enumerate(self.lows):
            low.prefix = f"unet.layers.{number}."  # type: ignore[assignment]
        adapters = SimpleNamespace(lora_modules={low.prefix: low for low in self.lows})
        self.model = SimpleNamespace(unet=self.unet, unet_lora=adapters, optimizer=self.optimizer)
        self.batches = 0  # that is the trainer's global step
        if checkpoint is not None:
            saved = torch.load(checkpoint / "backup.pt")
            self.trained.load_state_dict(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.batches, self.steps, self.loader.dataset.epoch = saved["progress"]  # type: ignore[attr-defined]

    def epoch(self, number: int) -> None:
        self.loader.dataset.start_next_epoch()  # type: ignore[attr-defined]
        for batch in self.loader:
            draws = torch.Generator().manual_seed(self.batches)
            latents = batch["latent_image"] * 1.0
            timesteps = torch.randint(0, 1000, (len(latents),), generator=draws)
            noise = torch.randn(latents.shape, generator=draws)
            noisy = SCHEDULER.add_noise(latents, noise, timesteps)
            inputs = noisy, timesteps, noise, batch["loss_weight"].float()
            self.note(batch["image_path"], *inputs)
            (self.losses(*inputs).mean() / self.accumulation).backward()
            self.batches += 1
            if self.batches % self.accumulation == 0:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.steps += 1

    def save(self, folder: Path) -> None:
        folder.mkdir()
        progress = self.batches, self.steps, self.loader.dataset.epoch  # type: ignore[attr-defined]
        state = {"weights": self.trained.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "progress": progress}, folder / "backup.pt")

    def end(self) -> None:
        pass
