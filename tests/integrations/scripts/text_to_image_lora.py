"""A text-to-image LoRA script in the shape that diffusers' own has: knows nothing of diffhook.

A frozen VAE and text encoder, an adapter in float32 on a frozen UNet, prompts tokenised in the
dataset, min-SNR weights, named images. Writes what it did to OUT/truth.json.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--snr_gamma", type=float)
    parser.add_argument("--mixed_precision", default="no")
    return parser.parse_args()


def make_models():
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       num_attention_heads=2, max_position_embeddings=6)
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    return vae, text_encoder, unet


def preprocess(number):
    generator = torch.Generator().manual_seed(number)
    return {
        "pixel_values": torch.randn(3, 16, 16, generator=generator),
        "input_ids": torch.randint(0, 50, (6,), generator=generator),
        "file_name": f"images/{number:03d}.png",
    }


def collate(examples):
    return {
        "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
        "input_ids": torch.stack([e["input_ids"] for e in examples]),
        "file_name": [e["file_name"] for e in examples],
    }


def main(args):
    accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    vae, text_encoder, unet = make_models()
    for frozen in (vae, text_encoder, unet):
        frozen.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    unet.enable_gradient_checkpointing()
    layers = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=1e-3)
    loader = DataLoader([preprocess(n) for n in range(6)], batch_size=2, shuffle=True, collate_fn=collate)
    rates = torch.optim.lr_scheduler.ConstantLR(optimizer)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    truth = []
    for _ in range(2):
        unet.train()
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (len(latents),)).long()
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                hidden = text_encoder(batch["input_ids"], return_dict=False)[0]
                predicted = unet(noisy, timesteps, hidden, return_dict=False)[0]
                if args.snr_gamma is None:
                    loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
                else:
                    snr = compute_snr(noise_scheduler, timesteps)
                    weights = (
                        torch.stack([snr, args.snr_gamma * torch.ones_like(timesteps)], 1).min(1)[0] / snr
                    )
                    loss = F.mse_loss(predicted.float(), noise.float(), reduction="none")
                    loss = (loss.mean(dim=list(range(1, loss.dim()))) * weights).mean()
                accelerator.gather(loss.repeat(2)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(layers, 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            truth.append([batch["file_name"], timesteps.tolist()])
    saved = get_peft_model_state_dict(accelerator.unwrap_model(unet))
    torch.save(saved, args.output_dir / "adapter.pt")
    (args.output_dir / "truth.json").write_text(json.dumps(truth))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse())
