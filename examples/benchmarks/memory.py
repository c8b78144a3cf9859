"""Whether memory grows while a run is watched: the slope of the resident size over 2,000 steps.

    python examples/benchmarks/memory.py [--steps 2000]

Trains a small UNet in an Accelerate loop, without the hook and with it, each in a process of its
own, after 1,200 steps to warm up: by then two shards were written, and a snapshot was taken while
one was nearly full. What waits to be written comes and goes, so the slope is that of each quarter's peak.
Prints both slopes and saves them to examples/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine

from diffhook.integrations.accelerate import DiffHook

RESULT = Path(__file__).parents[1] / "results" / "memory.json"
BATCH = 8
WARM_UP = 1200
EVERY = 20  # steps between two looks at the resident size


def train(steps: int, log: str | None) -> list[int]:
    """Resident bytes, once in ``EVERY`` of so many steps after the warm-up."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    if log is not None:
        DiffHook(accelerator, log, strict=True, every=1, snapshot_every=500)
    model: Any = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    loader: Any = DataLoader(TensorDataset(torch.randn(512, 1, 8, 8)), BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    process, sizes, step = psutil.Process(), [], -WARM_UP
    while step < steps:
        for (clean,) in loader:
            noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
            predicted = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            accelerator.backward(F.mse_loss(predicted, noise))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step > 0 and step % EVERY == 0:
                sizes.append(process.memory_info().rss)
            if step == steps:
                break
    accelerator.end_training()
    return sizes


def measure(name: str, steps: int, log: str | None) -> dict[str, Any]:
    """One process's slope."""
    command = [sys.executable, __file__, "--steps", str(steps), "--child", log or ""]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    sizes = np.array(json.loads(done.stdout.splitlines()[-1]), float)
    peaks = [float(quarter.max()) for quarter in np.array_split(sizes, 4)]
    slope = float(np.polyfit(np.arange(4) * steps / 4, peaks, 1)[0])
    return {
        "run": name,
        "bytes_per_step": round(slope, 1),
        "first_quarter_mib": round(peaks[0] / 2**20, 1),
        "last_quarter_mib": round(peaks[-1] / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="at least 80")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(train(args.steps, args.child or None)))
        return
    with tempfile.TemporaryDirectory() as folder:
        logs = {"without diffhook": None, "with diffhook": f"{folder}/log"}
        rows = [measure(name, args.steps, log) for name, log in logs.items()]
    for row in rows:
        print(
            f"{row['run']:<18} {row['bytes_per_step']:>10,.0f} bytes a step  "
            f"({row['first_quarter_mib']:.0f} → {row['last_quarter_mib']:.0f} MiB)"
        )
    document = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "steps": args.steps,
        "batch": BATCH,
        "results": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
