"""denoising-diffusion-pytorch: all is prepared at once; the trained module draws its timesteps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

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
    files: ClassVar = {
        "denoising_diffusion_pytorch.py": """
            from tests.integrations.trainers.lucidrains import Lucidrains
            def Unet(*, dim, dim_mults):
                return None
            def GaussianDiffusion(model, *, image_size):
                return None
            def Trainer(diffusion, folder, *, train_num_steps, save_and_sample_every, calculate_fid):
                return Lucidrains(range(train_num_steps // 2))
        """
    }

    @classmethod
    def arguments(cls, epochs: Sequence[int], checkpoint: str = "", save: str = "") -> list[str]:
        steps = ["--steps", str(2 * epochs[-1] + 2)]
        return [*steps, "--milestone", str(epochs[0])] if checkpoint else steps

    def set_up(self, checkpoint: Path | None) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.ds = _Folder()
        loader = self.accelerator.prepare(DataLoader(self.ds, BATCH, shuffle=True))
        self.batches = _cycle(loader)
        self.diffusion: Any = _Diffusion(self.unet)
        self.diffusion, self.optimizer = self.accelerator.prepare(self.diffusion, self.optimizer)

    def load(self, milestone: int) -> None:
        saved = torch.load(Path("results", f"model-{milestone}.pt"))
        self.trained.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["opt"])
        self.steps, self.epochs = saved["step"], self.epochs[milestone:]

    def epoch(self, number: int) -> None:
        for _ in range(2):
            images = next(self.batches)
            loss = self.diffusion(images)
            self.note(names_of(images), *self.diffusion.last)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
        self.save(Path("results"))

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        state = {"model": self.trained.state_dict(), "opt": self.optimizer.state_dict(), "step": self.steps}
        torch.save(state, folder / f"model-{self.steps // 2}.pt")

    def end(self) -> None:
        pass
