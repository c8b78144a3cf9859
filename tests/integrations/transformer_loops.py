"""Trainings of tiny transformers, in words of their own, and the loss of one sample from its formula.

Each loop mixes, tells and weighs as diffusers' script for its model does. Batches hold latents and what text
encoders made of captions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import diffhook
from diffhook.integrations.accelerate import DiffHook
from tests.denoisers import awake

COUNT, BATCH = 24, 8
CHANNELS, SIDE, WORDS, WIDTH, POOLED = 4, 8, 6, 16, 12
GRID = diffhook.Grid(3)
Item = dict[str, Tensor]
Change = Callable[[dict[str, Any]], dict[str, Any]]

_HEADS: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 8}


def items(sides: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)) -> list[Item]:
    """Latents, which are no noise, and captions; of several sides in turn, a batch of each."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(COUNT):
        side = sides[index // BATCH % len(sides)]
        latents = torch.rand(CHANNELS, *side, generator=generator).cumsum(2) / 2 - 1
        mask = torch.arange(WORDS) < 2 + index % (WORDS - 1)
        found.append(
            {
                "latents": latents,
                "text": torch.randn(WORDS, WIDTH, generator=generator),
                "mask": mask.long(),
                "pooled": torch.randn(POOLED, generator=generator),
                "index": torch.tensor(index),
            }
        )
    return found


class _Items(Dataset[Item]):
    def __init__(self, found: list[Item]) -> None:
        self.found = found

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> Item:
        return self.found[index]


class Training(ABC):
    """One kind of model.

    Attributes:
        lora: train an adapter alone.
        half: all in bfloat16.
        change: of what the model is called with.
    """

    def __init__(self, *, lora: bool = False, half: bool = False, change: Change = lambda told: told) -> None:
        self.change, self.dtype = change, torch.bfloat16 if half else torch.float32
        torch.manual_seed(0)
        self.model: nn.Module = awake(self.make()).train()
        if lora:
            self.model.requires_grad_(False)
            config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
            inject_adapter_in_model(config, self.model)
        self.model.to(self.dtype)

    @abstractmethod
    def make(self) -> Any: ...

    @abstractmethod
    def loss(self, model: Any, batch: Item) -> Tensor:
        """As a loop computes it, a mean."""

    @abstractmethod
    def twin(self, model: Any, sample: Item, noise: Tensor, timestep: float) -> Tensor:
        """One sample's, from the formula; noise as the model gets it."""

    def noise_like(self, latents: Tensor) -> Tensor:
        """What noise is drawn like: as the model gets it."""
        return latents

    def run(
        self, log: Path | None, found: list[Item] | None = None, *, epochs: int = 4, **options: Any
    ) -> nn.Module:
        torch.manual_seed(1)
        accelerator = Accelerator(cpu=True)
        if log is not None:
            given = {"probe": diffhook.Probe(None, GRID, label_timesteps=0), "snapshot_every": 4} | options
            DiffHook(accelerator, log, every=1, strict=True, **given)
        loader = DataLoader(_Items(items() if found is None else found), BATCH, shuffle=found is None)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-3)
        model, optimizer, loader = accelerator.prepare(self.model, optimizer, loader)
        for _ in range(epochs):
            for given in loader:
                batch = {n: v.to(self.dtype) if v.is_floating_point() else v for n, v in given.items()}
                with accelerator.accumulate(model):
                    accelerator.backward(self.loss(model, batch))
                    optimizer.step()
                    optimizer.zero_grad()
        accelerator.end_training()
        return self.model


class _Flow(Training):
    """Mixes by itself, at shifted timesteps of a scheduler's table, as the scripts do."""

    scheme, shift = "logit_normal", 3.0

    def mix(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noise, timesteps in 0 … 1000, σ and x_σ."""
        table = FlowMatchEulerDiscreteScheduler(shift=self.shift)
        noise = torch.randn_like(latents)
        density = compute_density_for_timestep_sampling(self.scheme, len(latents), 0.0, 1.0, 1.29)
        places = (density * len(table.timesteps)).long().clamp(max=len(table.timesteps) - 1)
        sigmas = table.sigmas[places].view(-1, 1, 1, 1).to(latents.dtype)
        return noise, table.timesteps[places], sigmas, (1.0 - sigmas) * latents + sigmas * noise

    def between(self, clean: Tensor, noise: Tensor, timestep: float) -> Tensor:
        """x_σ, as a twin has it."""
        return clean + timestep / 1000 * (noise - clean)

    def error(self, flow: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
        return (flow - (noise - clean)).square().mean()


class StableDiffusion3(_Flow):
    """train_dreambooth_lora_sd3.py and train_dreambooth_sd3.py, with preconditioned outputs."""

    def make(self) -> Any:
        return SD3Transformer2DModel(
            **_HEADS, sample_size=SIDE, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS,
            num_layers=2, joint_attention_dim=WIDTH, caption_projection_dim=16,
            pooled_projection_dim=POOLED, pos_embed_max_size=8, qk_norm="rms_norm",
        )  # fmt: skip

    def loss(self, model: Any, batch: Item) -> Tensor:
        latents = batch["latents"]
        _, timesteps, sigmas, mixed = self.mix(latents)
        told = {"encoder_hidden_states": batch["text"], "pooled_projections": batch["pooled"]}
        answer = model(hidden_states=mixed, timestep=timesteps, return_dict=False, **self.change(told))[0]
        answer = answer * (-sigmas) + mixed
        weights = compute_loss_weighting_for_sd3(weighting_scheme=self.scheme, sigmas=sigmas)
        errors = (weights.float() * (answer.float() - latents.float()) ** 2).reshape(len(latents), -1)
        return errors.mean(1).mean()

    def twin(self, model: Any, sample: Item, noise: Tensor, timestep: float) -> Tensor:
        clean = sample["latents"]
        told = sample["text"], sample["pooled"], torch.tensor([timestep])
        flow = model(self.between(clean, noise, timestep), *told).sample
        return (timestep / 1000) ** 2 * self.error(flow, clean, noise)


class Flux(_Flow):
    """train_dreambooth_lora_flux.py: packed latents, places of tokens, guidance, timesteps below 1."""

    guidance = 3.5

    def make(self) -> Any:
        return FluxTransformer2DModel(
            **_HEADS, in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
            pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip

    def loss(self, model: Any, batch: Item) -> Tensor:
        latents = batch["latents"]
        count, channels, height, width = latents.shape
        noise, timesteps, sigmas, mixed = self.mix(latents)
        places = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", mixed.dtype)
        told = {
            "guidance": torch.tensor([self.guidance]).expand(count),
            "pooled_projections": batch["pooled"],
            "encoder_hidden_states": batch["text"],
            "txt_ids": torch.zeros(batch["text"].shape[1], 3, dtype=mixed.dtype),
            "img_ids": places,
        }
        packed = FluxPipeline._pack_latents(mixed, count, channels, height, width)
        answer = model(
            hidden_states=packed, timestep=timesteps / 1000, return_dict=False, **self.change(told)
        )[0]
        answer = FluxPipeline._unpack_latents(answer, height * 2, width * 2, 2)
        weights = compute_loss_weighting_for_sd3(weighting_scheme=self.scheme, sigmas=sigmas)
        target = noise - latents
        errors = weights.float() * (answer.float() - target.float()) ** 2
        return torch.mean(errors.reshape(count, -1), 1).mean()

    def noise_like(self, latents: Tensor) -> Tensor:
        return FluxPipeline._pack_latents(latents, *latents.shape)

    def twin(self, model: Any, sample: Item, noise: Tensor, timestep: float) -> Tensor:
        latents = sample["latents"]
        _, channels, height, width = latents.shape
        noise = FluxPipeline._unpack_latents(noise, height * 2, width * 2, 2)
        mixed = self.between(latents, noise, timestep)
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(latents)
        answer = model(
            FluxPipeline._pack_latents(mixed, 1, channels, height, width), sample["text"], sample["pooled"],
            torch.tensor([timestep / 1000]).to(latents), places, torch.zeros(WORDS, 3).to(latents),
            torch.tensor([self.guidance]).to(latents),
        ).sample  # fmt: skip
        flow = FluxPipeline._unpack_latents(answer, height * 2, width * 2, 2)
        return self.error(flow, latents, noise)


class Sana(_Flow):
    """train_dreambooth_lora_sana.py."""

    def make(self) -> Any:
        return SanaTransformer2DModel(
            **_HEADS, patch_size=1, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=1,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=WIDTH, sample_size=SIDE,
        )  # fmt: skip

    def loss(self, model: Any, batch: Item) -> Tensor:
        latents = batch["latents"]
        noise, timesteps, _, mixed = self.mix(latents)
        told = {"encoder_hidden_states": batch["text"], "encoder_attention_mask": batch["mask"]}
        answer = model(hidden_states=mixed, timestep=timesteps, return_dict=False, **self.change(told))[0]
        return ((answer.float() - (noise - latents).float()) ** 2).reshape(len(latents), -1).mean(1).mean()

    def twin(self, model: Any, sample: Item, noise: Tensor, timestep: float) -> Tensor:
        clean = sample["latents"]
        mixed, times = self.between(clean, noise, timestep), torch.tensor([timestep]).double()
        flow = model(mixed, sample["text"], times, encoder_attention_mask=sample["mask"]).sample
        return self.error(flow, clean, noise)


class PixArt(Training):
    """train_pixart_controlnet_hf.py without its control: the first half of the channels is the noise."""

    def make(self) -> Any:
        return PixArtTransformer2DModel(
            **_HEADS, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=2, sample_size=SIDE,
            norm_num_groups=4, cross_attention_dim=16, caption_channels=WIDTH,
            use_additional_conditions=False,
        )  # fmt: skip

    def size_told(self, count: int) -> dict[str, Tensor | None]:
        return {"resolution": None, "aspect_ratio": None}

    def loss(self, model: Any, batch: Item) -> Tensor:
        latents, scheduler = batch["latents"], DDPMScheduler()
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        told = {
            "encoder_hidden_states": batch["text"],
            "encoder_attention_mask": batch["mask"],
            "added_cond_kwargs": self.size_told(len(latents)),
        }
        noisy = scheduler.add_noise(latents, noise, timesteps)
        answer = model(noisy, timestep=timesteps, return_dict=False, **self.change(told))[0]
        return nn.functional.mse_loss(answer.chunk(2, 1)[0].float(), noise.float(), reduction="mean")

    def twin(self, model: Any, sample: Item, noise: Tensor, timestep: float) -> Tensor:
        kept = DDPMScheduler().alphas_cumprod.double()[int(timestep)]
        mixed = kept.sqrt() * sample["latents"] + (1 - kept).sqrt() * noise
        sizes = {name: None if v is None else v.double() for name, v in self.size_told(1).items()}
        answer = model(
            mixed, sample["text"], torch.tensor([int(timestep)]), sizes,
            encoder_attention_mask=sample["mask"],
        ).sample  # fmt: skip
        return (answer[:, :CHANNELS] - noise).square().mean()


class PixArtToldSizes(PixArt):
    """The same, told the images' size."""

    def make(self) -> Any:
        return PixArtTransformer2DModel(
            num_attention_heads=3, attention_head_dim=8, in_channels=CHANNELS, out_channels=2 * CHANNELS,
            num_layers=1, sample_size=128, norm_num_groups=4, cross_attention_dim=24,
            caption_channels=WIDTH, use_additional_conditions=True,
        )  # fmt: skip

    def size_told(self, count: int) -> dict[str, Tensor | None]:
        resolution = torch.tensor([512.0, 512.0]).repeat(count, 1)
        return {"resolution": resolution, "aspect_ratio": torch.ones(1).repeat(count, 1)}


TRAININGS: dict[str, type[Training]] = {
    kind.__name__: kind for kind in (StableDiffusion3, Flux, PixArt, PixArtToldSizes, Sana)
}
