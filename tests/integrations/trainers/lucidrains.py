"""denoising-diffusion-pytorch: prepared before there is a hook; the trained module draws its timesteps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffhook.integrations.accelerate import DiffHook
from tests.integrations.trainers.trainer import BATCH, Trainer, files, names_of
from tests.runs import SCHEDULER


class _Folder(Dataset[Any]):
    """Images alone; where they lie is known to the dataset only."""

    def __init__(self) -> None:
        own = files()[0][:3]  # all of one size
        self.paths, self.images = [Path(file.path) for file in own], [file.latent for file in own]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class _Diffusion(nn.Module):
    """Makes its loss itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        noise, time = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        self.last = SCHEDULER.add_noise(images, noise, time), time, noise
        return nn.functional.mse_loss(self.model(*self.last[:2])[0], noise)


def _cycle(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


class Lucidrains(Trainer):
    low_rank = False

    def set_up(self, log: Path | None, checkpoint: Path | None) -> None:
        self.accelerator = Accelerator(cpu=True)
        data = _Folder()
        loader = self.accelerator.prepare(DataLoader(data, BATCH, shuffle=True))
        self.batches = _cycle(loader)
        self.diffusion: Any = _Diffusion(self.unet)
        self.diffusion, self.optimizer = self.accelerator.prepare(self.diffusion, self.optimizer)
        if checkpoint is not None:
            saved = torch.load(checkpoint / "model.pt")
            self.trained.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["opt"])
            self.steps = saved["step"]
        if log is not None:
            options: dict[str, Any] = {"projection_dim": 0, "strict": True, "alerts": ()}

            def paths(batch: Any, places: Tensor) -> list[str]:
                return [str(data.paths[place]) for place in places.tolist()]

            DiffHook(self.accelerator, log, sample_ids=paths, **options)

    def epoch(self, number: int) -> None:
        for _ in range(2):
            images = next(self.batches)
            loss = self.diffusion(images)
            self.note(names_of(images), *self.diffusion.last)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1

    def save(self, folder: Path) -> None:
        folder.mkdir()
        state = {"model": self.trained.state_dict(), "opt": self.optimizer.state_dict(), "step": self.steps}
        torch.save(state, folder / "model.pt")

    def end(self) -> None:
        self.accelerator.end_training()
