"""An unconditional training script in the shape that diffusers' own has: knows nothing of diffhook.

Resumes by walking the loader and skipping what was done, rotates its checkpoints, keeps an average
of the weights, draws images with it between epochs. Writes what it did to OUT/truth-RANK.json.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    def __init__(self, count):
        self.pixels = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"input": self.pixels[index], "truth": index}


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_epochs", type=int, default=2)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--checkpointing_steps", type=int, default=2)
    parser.add_argument("--checkpoints_total_limit", type=int, default=1)
    parser.add_argument("--resume_from_checkpoint", action="store_true")
    parser.add_argument("--fail_at_step", type=int)
    return parser.parse_args()


def make_model():
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )


def rotate(output_dir, limit):
    kept = sorted(output_dir.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for old in kept[: max(len(kept) - limit + 1, 0)]:
        shutil.rmtree(old)


def main(args):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    torch.manual_seed(0)
    model, noise_scheduler = make_model(), DDPMScheduler(num_train_timesteps=1000)
    ema = EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Pictures(10), batch_size=args.train_batch_size, shuffle=True)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=20)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    global_step = 0
    if args.resume_from_checkpoint:
        last = max(args.output_dir.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        accelerator.load_state(str(last))
        global_step = int(last.name.split("-")[1])
    done, truth = global_step, []
    for _ in range(args.num_epochs):
        model.train()
        for batch in loader:
            if done > 0:  # walk past what the checkpoint has seen
                done -= 1
                continue
            clean = batch["input"]
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean),)).long()
            with accelerator.accumulate(model):
                output = model(noise_scheduler.add_noise(clean, noise, timesteps), timesteps).sample
                loss = F.mse_loss(output.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            truth.append([global_step, batch["truth"].tolist(), timesteps.tolist()])
            if accelerator.sync_gradients:
                ema.step(model.parameters())
                global_step += 1
                if global_step == args.fail_at_step:
                    raise ValueError("the script's own error")
                if global_step % args.checkpointing_steps == 0 and accelerator.is_main_process:
                    rotate(args.output_dir, args.checkpoints_total_limit)
                    accelerator.save_state(str(args.output_dir / f"checkpoint-{global_step}"))
        unet = accelerator.unwrap_model(model)
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        pipeline = DDPMPipeline(unet=unet, scheduler=noise_scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline(batch_size=1, num_inference_steps=2, output_type="np")
        ema.restore(unet.parameters())
    rank = accelerator.process_index
    accelerator.end_training()
    (args.output_dir / f"truth-{rank}.json").write_text(json.dumps(truth))
    state = {n: p.detach().clone() for n, p in accelerator.unwrap_model(model).named_parameters()}
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
               args.output_dir / f"end-{rank}.pt")  # fmt: skip


if __name__ == "__main__":
    main(parse())
