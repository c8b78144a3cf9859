"""Stand-ins for the networks that trainers put on a model: LoRA as kohya's scripts have it, LoHa and LoKr as
LyCORIS does, by the papers' formulas (arXiv 2106.09685, 2108.06098, 2212.10650)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from diffhook.integrations.accelerate import DiffHook
from tests.pipelines import CAPTIONS, Captioned, images

RANK, ALPHA = 2, 3.0
DENOISER, TEXT = "lora_unet_", "lora_te_text_model_"
_HOSTS = ("attn1.to_q", "attn2.to_v", "to_out.0", "proj_in", "conv1", "q_proj")


class Adapter(nn.Module):
    """Takes the place of a frozen layer's forward."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.host = (host,)  # no submodule
        self.register_buffer("alpha", torch.tensor(ALPHA))
        out, inward, *kernel = host.weight.shape
        self.make(out, inward, kernel)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        host.forward = self.forward

    def make(self, out: int, inward: int, kernel: list[int]) -> None:
        raise NotImplementedError

    def change(self) -> Tensor:
        """Of the host's weight, before its scale."""
        raise NotImplementedError

    def scale(self) -> float:
        return float(self.alpha) / RANK  # type: ignore[arg-type]

    def forward(self, inputs: Tensor) -> Tensor:
        (host,) = self.host
        weight = host.weight + self.change().view_as(host.weight) * self.scale()
        if isinstance(host, nn.Linear):
            return F.linear(inputs, weight, host.bias)
        return F.conv2d(inputs, weight, host.bias, host.stride, host.padding)


class Lora(Adapter):
    def make(self, out: int, inward: int, kernel: list[int]) -> None:
        (host,) = self.host
        if kernel:
            self.lora_down: Any = nn.Conv2d(inward, RANK, kernel, host.stride, host.padding, bias=False)
            self.lora_up: Any = nn.Conv2d(RANK, out, 1, bias=False)
        else:
            self.lora_down = nn.Linear(inward, RANK, bias=False)
            self.lora_up = nn.Linear(RANK, out, bias=False)
        self.own = type(host).forward

    def change(self) -> Tensor:
        found: Tensor = self.lora_up.weight.flatten(1) @ self.lora_down.weight.flatten(1)
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.own(*self.host, inputs) + self.lora_up(self.lora_down(inputs)) * self.scale()
        return found


class Loha(Adapter):
    def make(self, out: int, inward: int, kernel: list[int]) -> None:
        columns = inward * int(torch.tensor(kernel).prod())
        for name in ("hada_w1", "hada_w2"):
            self.register_parameter(f"{name}_a", nn.Parameter(torch.empty(out, RANK)))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.empty(RANK, columns)))

    def change(self) -> Tensor:
        own = dict(self.named_parameters())
        return (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])


class Lokr(Adapter):
    """A small whole factor, and one of low rank where that is smaller."""

    def make(self, out: int, inward: int, kernel: list[int]) -> None:
        self.lokr_w1 = nn.Parameter(torch.empty(2, 2))
        rows, columns = out // 2, inward // 2
        self.whole = max(rows, columns) / 2 <= RANK
        if self.whole:
            self.lokr_w2 = nn.Parameter(torch.empty(rows, columns, *kernel))
        else:
            self.lokr_w2_a = nn.Parameter(torch.empty(rows, RANK))
            self.lokr_w2_b = nn.Parameter(torch.empty(RANK, columns * int(torch.tensor(kernel).prod())))

    def scale(self) -> float:
        return 1.0 if self.whole else super().scale()

    def change(self) -> Tensor:
        (host,) = self.host
        second = self.lokr_w2 if self.whole else self.lokr_w2_a @ self.lokr_w2_b
        second = second.view(*(side // 2 for side in host.weight.shape[:2]), *host.weight.shape[2:])
        first = self.lokr_w1.view(2, 2, *(1 for _ in host.weight.shape[2:]))
        return torch.kron(first, second.contiguous())


KINDS: dict[str, type[Adapter]] = {"LoRA": Lora, "LoHa": Loha, "LoKr": Lokr}


class Network(nn.Module):
    """Adapters by their hosts' paths, which the trainer has flattened.

    Args:
        models: prefix → model.
    """

    def __init__(self, kind: str, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for prefix, model in models.items():
            for path, host in list(model.named_modules()):
                if path.endswith(_HOSTS) and not isinstance(host, Adapter):
                    self.add_module(prefix + path.replace(".", "_"), KINDS[kind](host))

    def save(self, file: Path) -> Path:
        safetensors.torch.save_file(self.state_dict(), file)
        return file


def load(pipeline: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.requires_grad_(False)
    return pipe


def put_on(pipe: Any, kind: str, *, text: bool = False) -> Network:
    return Network(kind, ({TEXT: pipe.text_encoder} if text else {}) | {DENOISER: pipe.unet})


def train_network(pipeline: Path, log: Path, kind: str, *, text: bool = False, **options: Any) -> Network:
    """Two steps of a trainer's loop, with the hook attached. It prepares the network alone."""
    torch.manual_seed(1)
    pipe = load(pipeline)
    network = put_on(pipe, kind, text=text)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    tokens = pipe.tokenizer(
        CAPTIONS, max_length=12, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    accelerator = Accelerator(cpu=True)
    DiffHook(accelerator, log, strict=True, alerts=(), **options)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    network, optimizer, loader = accelerator.prepare(
        network, optimizer, DataLoader(Captioned(images(), tokens), 2)
    )
    for batch in loader:
        latents = pipe.vae.encode(batch["pixel_values"]).latent_dist.sample()
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = pipe.unet(noisy, timesteps, pipe.text_encoder(batch["input_ids"])[0]).sample
        accelerator.backward(F.mse_loss(predicted, noise))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    return network
