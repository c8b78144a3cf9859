"""What the stand-ins share: a small model, two buckets of images, and the batch-1 loop beside them."""

from __future__ import annotations

import argparse
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.runs import TinyDenoiser
from tests.twins import double, rows

BATCH = 2
SMALL, WIDE = (1, 8, 8), (1, 8, 12)
PRIOR_LOSS_WEIGHT = 0.5


@dataclass
class File:
    """An image on disk, of which the trainers have cached the latent."""

    path: str
    latent: Tensor
    caption: str = "a photo"
    is_reg: bool = False
    loss_multiplier: float = 1.0

    @property
    def item_key(self) -> str:
        return Path(self.path).stem

    @property
    def latent_cache_path(self) -> str:
        return str(Path(self.path).with_name(f"{self.item_key}_0008x0008_tiny.safetensors"))


def names_of(latents: Tensor) -> list[str]:
    """By what is in them."""
    known = [file for bucket in files() for file in bucket]
    return [next(file.path for file in known if torch.equal(file.latent, latent)) for latent in latents]


def files() -> list[list[File]]:
    """Two buckets of four entries: three images, one of them twice, with two captions; and two
    regularisation images, each also flipped."""
    draws = torch.Generator().manual_seed(1)
    small = [File(f"photos/{name}.png", torch.randn(SMALL, generator=draws)) for name in "abc"]
    wide = [File(f"photos/reg/{name}.png", torch.randn(WIDE, generator=draws), is_reg=True) for name in "de"]
    flipped = [replace(file, latent=file.latent.flip(-1)) for file in wide]
    return [[*small, replace(small[0], caption="another photo")], [*wide, *flipped]]


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
    """What all of them share. None knows of us.

    Args:
        epochs: to train.
        checkpoint: a folder that an earlier one has saved to: training goes on from there.
    """

    files: ClassVar[Mapping[str, str]]
    """Path → content, of what the trainer's user has installed."""

    last: ClassVar[Trainer]
    """The one that was made last."""

    low_rank = True
    workers = 0

    def __init__(self, epochs: Sequence[int], checkpoint: Path | None = None) -> None:
        Trainer.last, self.epochs = self, epochs
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
        self.set_up(checkpoint)

    @classmethod
    def main(cls, **parts: Any) -> None:
        """What the trainer's script does.

        Args:
            parts: of the class, as the user's installation has them.
        """
        parser = argparse.ArgumentParser()
        parser.add_argument("--epochs", type=int, nargs="+")
        parser.add_argument("--checkpoint", type=Path)
        parser.add_argument("--save", type=Path)
        parser.add_argument("--workers", type=int, default=0)
        args, _ = parser.parse_known_args()
        kind = type(cls.__name__, (cls,), parts | {"workers": args.workers})
        trainer = kind(args.epochs, args.checkpoint)
        trainer.train()
        if args.save is not None:
            trainer.save(args.save)
        trainer.end()

    @classmethod
    def arguments(cls, epochs: Sequence[int], checkpoint: str = "", save: str = "") -> list[str]:
        """Of the command line that runs :meth:`main`."""
        named = [("--checkpoint", checkpoint), ("--save", save)]
        return ["--epochs", *map(str, epochs), *(word for pair in named if pair[1] for word in pair)]

    @abstractmethod
    def set_up(self, checkpoint: Path | None) -> None:
        """Prepare, and load the checkpoint."""

    @abstractmethod
    def epoch(self, number: int) -> None: ...

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    @abstractmethod
    def end(self) -> None: ...

    def train(self) -> None:
        for number in self.epochs:
            torch.manual_seed(100 + number)
            random.seed(number)
            self.epoch(number)

    def losses(self, noisy: Tensor, timesteps: Tensor, target: Tensor, weights: Any = 1.0) -> Tensor:
        found: Tensor = (self.unet(noisy, timesteps)[0] - target).square().flatten(1).mean(1) * weights
        return found

    def note(self, names: list[str], *inputs: Tensor) -> None:
        weights = {name: value.clone() for name, value in self.trained.state_dict().items()}
        self.visits.append(Visit(self.steps, list(names), weights, inputs))

    def expected(self, *, by_stem: bool = False) -> list[tuple[int, str, float, float]]:
        """(step, name, timestep, norm) of each row, by a batch-1 loop in float64; after :meth:`end`.

        Args:
            by_stem: names are paths without the suffix.
        """
        self.unet.double()
        self.lows.double()
        found = []
        for visit in self.visits:
            self.trained.load_state_dict(visit.weights)
            for row, name in enumerate(visit.names):
                loss = self.losses(*double(rows(visit.inputs, slice(row, row + 1)))).sum()
                shares = torch.autograd.grad(loss, list(self.trained.parameters()))
                norm = float(torch.cat([share.flatten() for share in shares]).norm())
                name = name.removesuffix(".png") if by_stem else name
                found.append((visit.step, name, float(visit.inputs[1][row]), norm))
        return sorted(found)
