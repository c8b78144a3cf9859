"""Kinds of training loops that errors of ours are injected into.

Each trains the same way with and without a log, and returns the trained model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

import diffhook
from diffhook.integrations.accelerate import DiffHook
from diffhook.integrations.torch import TorchHook
from diffhook.integrations.transformers import DiffHookCallback
from tests.runs import SCHEDULER, TinyDenoiser, denoising_losses, identified, train

Loop = Callable[[Path | None], nn.Module]

HOOKS: tuple[type[Any], ...] = (DiffHook, TorchHook, DiffHookCallback)


class MixedDenoiser(nn.Module):
    """Convolution, attention and a checkpointed block beside parameters that only the fallback follows."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.inward = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)
        self.block = nn.Sequential(nn.Linear(channels, 8), nn.Dropout(0.1), nn.Linear(8, channels))
        self.outward = nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1)
        self.positions = nn.Parameter(torch.randn(16, channels) / 4)
        self.gain = nn.Parameter(torch.ones(channels))
        self.time = nn.Parameter(torch.randn(channels, 2) / 2)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        angle = timestep.to(sample.dtype)[:, None] / 100
        time = F.linear(torch.cat([angle.sin(), angle.cos()], 1), self.time * 0.5)
        inward = self.inward(sample)
        tokens = inward.flatten(2).transpose(1, 2) + self.positions + time[:, None]
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0] * self.gain
        tokens = tokens + checkpoint(self.block, tokens, use_reentrant=False)
        return (self.outward(tokens.transpose(1, 2).reshape(inward.shape)),)


def accelerated(log: Path | None) -> nn.Module:
    """Accelerate's, with accumulation and snapshots."""
    return train(log, strict=False, epochs=2, accumulation=2, snapshot_every=2).model


def mixed(log: Path | None) -> nn.Module:
    """Of a model of which layers, fallback and gradient checkpointing each have a part."""
    return train(log, strict=False, epochs=2, make_model=MixedDenoiser).model


class _Augmented(Dataset[Tensor]):
    """Fetches a batch at once, and draws random numbers for it."""

    def __init__(self) -> None:
        self.images = identified(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index] + torch.randn(1, 8, 8) / 10

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self[index] for index in indices]


def probed(log: Path | None) -> nn.Module:
    """With all that can be turned on: probes, snapshots, thumbnails, quarantine, checkpoints."""
    torch.manual_seed(3)
    model: Any = TinyDenoiser()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader: Any = DataLoader(_Augmented(), 4, shuffle=True)
    accelerator = Accelerator(cpu=True)
    if log is not None:
        DiffHook(
            accelerator,
            log,
            objective=diffhook.DiffusionObjective(SCHEDULER),
            probe=diffhook.Probe(3, diffhook.Grid(2, draws=2)),
            alerts=diffhook.Alerts(quarantine=diffhook.Quarantine(kinds=())),
            keep_preconditioner=True,
            snapshot_every=2,
            thumbnails=8,
        )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(3):
        for clean in loader:
            _step(model, optimizer, clean, accelerator.backward)
            accelerator.log({"epoch": epoch})
        with tempfile.TemporaryDirectory() as folder:
            accelerator.save_state(folder)
    accelerator.end_training()
    return accelerator.unwrap_model(model)


def recognised(log: Path | None) -> nn.Module:
    """Long enough for its loss to be recognised, and probed by it."""
    probe = diffhook.Probe(None, diffhook.Grid(1), label_timesteps=0)
    return train(log, strict=False, count=16, batch_size=8, epochs=6, probe=probe, snapshot_every=5).model


def reused(log: Path | None) -> nn.Module:
    """Gradients that training uses come from us: equal up to rounding."""
    return plain(log, reuse_products=True)


def plain(log: Path | None, **options: Any) -> nn.Module:
    """Without Accelerate: the loop names its samples itself."""
    torch.manual_seed(3)
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    hook = None if log is None else TorchHook(log, model, optimizer, snapshot_every=3, **options)
    images = identified(8)
    for number in range(6):
        ids = torch.arange(4) + 4 * (number % 2)
        if hook is None:
            _step(model, optimizer, images[ids], Tensor.backward)
            continue
        with hook.step(sample_ids=ids, batch=images[ids]):
            _step(model, optimizer, images[ids], Tensor.backward)
        hook.flush()
    if hook is not None:
        hook.close()
    return model


def _step(model: nn.Module, optimizer: Any, clean: Tensor, backward: Callable[[Tensor], Any]) -> None:
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
    backward(denoising_losses(model, (clean, noise, timesteps)).mean())
    optimizer.step()
    optimizer.zero_grad()


class _Denoising(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return denoising_losses(model, (inputs["clean"], inputs["noise"], inputs["timestep"])).mean()


def trained(log: Path | None) -> nn.Module:
    """transformers' Trainer, which fetches all micro-batches of a step before the first is used."""
    torch.manual_seed(3)
    images, noise = identified(8), torch.randn(8, 1, 8, 8)
    items = [{"clean": images[i], "noise": noise[i], "timestep": torch.tensor(90 * i)} for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            remove_unused_columns=False,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = _Denoising(TinyDenoiser(), arguments, train_dataset=items)  # type: ignore[arg-type]
        if log is not None:
            trainer.add_callback(DiffHookCallback(trainer, log))
        trainer.train()
        return trainer.model  # type: ignore[return-value]


LOOPS: dict[str, Loop] = {
    loop.__name__: loop for loop in (accelerated, mixed, probed, plain, recognised, reused, trained)
}
