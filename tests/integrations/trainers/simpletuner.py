"""SimpleTuner: backends that are not prepared, and an iterator for every batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from tests.integrations.trainers.trainer import BATCH, File, Trainer, files
from tests.runs import SCHEDULER


class _Drawn(Sampler[Any]):
    """Keeps its place from one iterator to the next, and yields whole batches of one bucket."""

    def __init__(self, buckets: list[list[File]]) -> None:
        self.buckets, self.queue = buckets, list[list[File]]()

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[File]]:
        while True:
            if not self.queue:
                for bucket in self.buckets:
                    mixed = random.sample(bucket, len(bucket))
                    self.queue += [mixed[start : start + BATCH] for start in range(0, len(mixed), BATCH)]
                random.shuffle(self.queue)
            yield self.queue.pop()


class _Examples(Dataset[Any]):
    """Is asked for samples by themselves, not by number."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, samples: Any) -> dict[str, Any]:
        told = [{"image_path": s.path, "latent": s.latent, "is_reg": s.is_reg} for s in samples]
        return {"training_samples": told}


def _gathered(batch: list[dict[str, Any]]) -> dict[str, Any]:
    examples = batch[0]["training_samples"]
    return {
        "latent_batch": torch.stack([example["latent"] for example in examples]),
        "filepaths": [example["image_path"] for example in examples],
        "prompts": ["a photo"] * len(examples),
        "is_regularisation_data": examples[0]["is_reg"],  # of a whole backend
    }


class SimpleTuner(Trainer):
    low_rank = False
    dataloader_prefetch = False
    files: ClassVar = {
        "simpletuner/train.py": """
            from tests.integrations.trainers.simpletuner import SimpleTuner
            SimpleTuner.main()
        """
    }

    def set_up(self, checkpoint: Path | None) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.backends = {
            f"backend-{number}": DataLoader(
                _Examples(), batch_size=1, sampler=_Drawn([bucket]), collate_fn=_gathered
            )
            for number, bucket in enumerate(files())
        }
        first, second = self.backends.values()
        rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        placement = [True] * 4
        self.unet, rates, self.optimizer, _ = self.accelerator.prepare(
            self.unet, rates, self.optimizer, first, device_placement=placement
        )
        self.accelerator.prepare(second)
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))

    def epoch(self, number: int) -> None:
        for step in range(4):
            batch = self.prepared(self.fetched(self.backends[f"backend-{step % 2}"]))
            with self.accelerator.accumulate(self.unet):
                inputs = batch["noisy_latents"], batch["timesteps"], batch["noise"]
                self.note(batch["filepaths"], *inputs)
                self.accelerator.backward(self.losses(*inputs).mean())
                self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1

    def fetched(self, backend: Any) -> dict[str, Any]:
        if not self.dataloader_prefetch:
            return next(iter(backend))  # type: ignore[no-any-return]
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: next(iter(backend))).result()  # type: ignore[no-any-return]

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["latents"] = batch["latent_batch"].to(dtype=torch.float32)
        batch["noise"] = torch.randn_like(batch["latents"])
        batch["timesteps"] = torch.multinomial(torch.ones(1000), len(batch["latents"]), replacement=True)
        batch["noisy_latents"] = SCHEDULER.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        return batch

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def end(self) -> None:
        self.accelerator.end_training()
