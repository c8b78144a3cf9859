"""What the stand-ins share: a small model, two buckets of images, and the batch-1 loop beside them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffhook.integrations.accelerate import DiffHook
from tests.runs import TinyDenoiser
from tests.twins import double, rows

BATCH = 2
SMALL, WIDE = (1, 8, 8), (1, 8, 12)


@dataclass
class File:
    """An image on disk, of which the trainers have cached the latent."""

    path: str
    latent: Tensor
    loss_multiplier: float = 1.0


def names_of(latents: Tensor) -> list[str]:
    """By what is in them."""
    known = [file for bucket in files() for file in bucket]
    return [next(file.path for file in known if torch.equal(file.latent, latent)) for latent in latents]


def files() -> list[list[File]]:
    """Two buckets of four entries: three images, one of them twice; and two images, each also flipped."""
    draws = torch.Generator().manual_seed(1)
    small = [File(f"photos/{name}.png", torch.randn(SMALL, generator=draws)) for name in "abc"]
    wide = [File(f"photos/wide/{name}.png", torch.randn(WIDE, generator=draws)) for name in "de"]
    flipped = [File(file.path, file.latent.flip(-1)) for file in wide]
    return [[*small, small[0]], [*wide, *flipped]]


class Low(nn.Module):
    """A low-rank update that takes the place of a frozen layer's forward."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.up: nn.Module
        if isinstance(host, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(host.in_channels, 2, 3, padding=1, bias=False)
            self.up = nn.Conv2d(2, host.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(host.in_features, 2, bias=False)
            self.up = nn.Linear(2, host.out_features, bias=False)
        self.original = [host.forward]  # in a list: no submodule of ours
        host.forward = self.forward

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.original[0](inputs) + self.up(self.down(inputs))
        return found


@dataclass
class Visit:
    """One micro-batch, and the weights on which it was seen."""

    step: int
    names: list[str]
    weights: dict[str, Tensor]
    inputs: tuple[Tensor, ...]  # noisy, timesteps, target, and weights of the losses


class Trainer(ABC):
    """What all of them share.

    Args:
        log: None: without us.
        checkpoint: a folder that an earlier one has saved to: training goes on from there.
    """

    low_rank = True

    def __init__(self, log: Path | None, checkpoint: Path | None = None) -> None:
        torch.manual_seed(0)
        self.unet: Any = TinyDenoiser()
        self.lows = nn.ModuleList()
        if self.low_rank:
            self.unet.requires_grad_(False)
            hosts = [m for m in self.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            self.lows = nn.ModuleList([Low(host) for host in hosts])
        self.trained: nn.Module = self.lows if self.low_rank else self.unet
        self.optimizer: Any = torch.optim.AdamW(self.trained.parameters(), 1e-2)
        self.visits: list[Visit] = []
        self.steps = 0
        self.set_up(log, checkpoint)

    @abstractmethod
    def set_up(self, log: Path | None, checkpoint: Path | None) -> None:
        """Attach the hook as the recipe says, prepare, and load the checkpoint."""

    @abstractmethod
    def epoch(self, number: int) -> None: ...

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    @abstractmethod
    def end(self) -> None: ...

    def train(self, *epochs: int) -> Trainer:
        for number in epochs:
            torch.manual_seed(100 + number)
            random.seed(number)
            self.epoch(number)
        return self

    def losses(self, noisy: Tensor, timesteps: Tensor, target: Tensor, weights: Any = 1.0) -> Tensor:
        found: Tensor = (self.unet(noisy, timesteps)[0] - target).square().flatten(1).mean(1) * weights
        return found

    def note(self, names: list[str], *inputs: Tensor) -> None:
        weights = {name: value.clone() for name, value in self.trained.state_dict().items()}
        self.visits.append(Visit(self.steps, list(names), weights, inputs))

    def expected(self) -> list[tuple[int, str, float, float]]:
        """(step, name, timestep, norm) of each row, by a batch-1 loop in float64; after :meth:`end`."""
        self.unet.double()
        self.lows.double()
        found = []
        for visit in self.visits:
            self.trained.load_state_dict(visit.weights)
            for row, name in enumerate(visit.names):
                loss = self.losses(*double(rows(visit.inputs, slice(row, row + 1)))).sum()
                shares = torch.autograd.grad(loss, list(self.trained.parameters()))
                norm = float(torch.cat([share.flatten() for share in shares]).norm())
                found.append((visit.step, name, float(visit.inputs[1][row]), norm))
        return sorted(found)


def hooked(log: Path | None, accelerator: Accelerator) -> None:
    """What `diffhook run` does once the trainer has made its Accelerator."""
    if log is not None:
        DiffHook(accelerator, log, projection_dim=0, strict=True, alerts=())
