"""Small training runs with the hook attached, and what a plain loop would say of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from diffhook.capture import DiffusionObjective, Grid, Probe
from diffhook.integrations.accelerate import DiffHook
from tests.twins import sample_gradients

SCHEDULER = DDPMScheduler(num_train_timesteps=1000)


class TinyDenoiser(nn.Module):
    """A few hundred parameters, called like a diffusers model."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.time = nn.Linear(2, channels)
        self.inward = nn.Conv2d(1, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.outward = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        angle = timestep.to(sample.dtype)[:, None] / 100
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        hidden = F.silu(self.norm(self.inward(sample)) + time[:, :, None, None])
        return (self.outward(hidden),)


def denoising_losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(B,) losses for (clean, noise, timesteps)."""
    clean, noise, timesteps = batch
    predicted = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps, return_dict=False)[0]
    return (predicted - noise).square().flatten(1).mean(1)


@dataclass
class Event:
    """One sample's visit, as the batch-size-1 loop sees it."""

    sample: int
    step: int
    timestep: int
    lr: float
    loss: float
    weight: float
    gradient: Tensor


@dataclass
class Run:
    model: nn.Module
    data: Tensor
    events: list[Event] = field(default_factory=list)


def identified(count: int = 12, size: int = 8) -> Tensor:
    """Images whose first pixel tells their index, so that a test can check ids independently."""
    images = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(5))
    images[:, 0, 0, 0] = torch.arange(count) / 16
    return images


def train(
    log: Path | None,
    *,
    make_model: Callable[[], nn.Module] = TinyDenoiser,
    count: int = 12,
    batch_size: int = 4,
    epochs: int = 3,
    accumulation: int = 1,
    workers: int = 0,
    twin: bool = False,
    model_hook: Callable[[nn.Module], None] | None = None,
    data: Tensor | None = None,
    strict: bool = True,
    make_dataset: Callable[[Tensor], TensorDataset] = TensorDataset,
    **options: Any,
) -> Run:
    """A plain Accelerate loop, with two lines of diffhook if ``log`` is given."""
    torch.manual_seed(3)
    model = make_model()
    data = identified(count) if data is None else data
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = DataLoader(make_dataset(data), batch_size, shuffle=True, num_workers=workers)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    if log is not None:
        DiffHook(accelerator, log, strict=strict, **options)
    model, optimizer, loader, rates = accelerator.prepare(model, optimizer, loader, rates)
    run = Run(model, data)
    step = 0
    for _ in range(epochs):
        for (clean,) in loader:
            noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
            batch = (clean, noise, timesteps)
            with accelerator.accumulate(model):
                if twin:
                    run.events += _twins(model, batch, step, optimizer, accumulation)
                loss = denoising_losses(model, batch).mean()
                accelerator.backward(loss)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            step += accelerator.sync_gradients
    accelerator.end_training()
    return run


class SteppedTraining:
    """A training whose every step depends on its number alone, so that one that was cut short and resumed has
    a twin that was left alone. The loop names its samples itself.

    Args:
        log: None: without us.
        options: of DiffHook.
    """

    def __init__(self, log: Path | str | None, **options: Any) -> None:
        torch.manual_seed(3)
        model = TinyDenoiser()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.accelerator = Accelerator(cpu=True)
        self.hook = DiffHook(
            self.accelerator, log or "none", projection_dim=16, enabled=log is not None, **options
        )
        self.model, self._optimizer = self.accelerator.prepare(model, optimizer)
        self._data = identified()

    def resume(self, checkpoint: Path) -> None:
        self.accelerator.load_state(str(checkpoint))

    def step(self, number: int, batch: int = 4) -> None:
        torch.manual_seed(number)
        ids = torch.randperm(len(self._data))[:batch]
        clean = self._data[ids]
        noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (batch,))
        with self.hook.step(sample_ids=ids, timesteps=timesteps):
            self.accelerator.backward(denoising_losses(self.model, (clean, noise, timesteps)).mean())
        self._optimizer.step()
        self._optimizer.zero_grad()


def probed() -> dict[str, Any]:
    """Options that have three samples probed, and say what queries are to be asked with."""
    probe = Probe([0, 5, 9], Grid(2), dataset=[(image,) for image in identified()])
    return {"probe": probe, "objective": DiffusionObjective(SCHEDULER)}


def _twins(model: nn.Module, batch: Any, step: int, optimizer: Any, accumulation: int) -> list[Event]:
    gradients = sample_gradients(model, denoising_losses, batch)
    with torch.no_grad():
        losses = denoising_losses(model, batch)
    return [
        Event(
            sample=round(float(image[0, 0, 0]) * 16),
            step=step,
            timestep=int(timestep),
            lr=optimizer.param_groups[0]["lr"],
            loss=float(loss),
            weight=1 / (len(losses) * accumulation),
            gradient=gradient,
        )
        for image, timestep, loss, gradient in zip(batch[0], batch[2], losses, gradients, strict=True)
    ]
