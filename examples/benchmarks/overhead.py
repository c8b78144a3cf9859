"""What a budget keeps to: a small UNet on MNIST digits, trained with diffhook and without, in turn.

    python examples/benchmarks/overhead.py [--steps 630] [--overhead 0.05]

Two loops with equal seeds, of four epochs, take turns, ten steps at a time, so that a noisy machine hits both
alike. Everything counts: calibration, the first pass's survey, snapshots, the writer, and the end with its
probe, if there is one. Saves examples/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import digits
from machine import machine
from models import digits_unet

from diffhook.integrations.accelerate import DiffHook

RESULT = Path(__file__).parents[1] / "results" / "overhead.json"
BATCH = 32
_BLOCK = 10  # steps of one loop before the other has its turn


def training(log: Path | None, **options: Any) -> Iterator[None]:
    """A plain loop, one optimiser step at a time; with a hook if ``log`` is given."""
    torch.manual_seed(0)
    images, _ = digits()
    loader = DataLoader(TensorDataset(torch.from_numpy(images)[:, None]), BATCH, shuffle=True)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    model = digits_unet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accelerator = Accelerator()
    hook = None if log is None else DiffHook(accelerator, log, snapshot_every=len(loader), **options)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    try:
        while True:
            for (clean,) in loader:
                noise = torch.randn_like(clean)
                timesteps = torch.randint(0, 1000, (len(clean),))
                predicted = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
                accelerator.backward(F.mse_loss(predicted, noise))
                optimizer.step()
                optimizer.zero_grad()
                yield
    finally:
        if hook is not None:
            hook.close()


def measure(steps: int, overhead: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        loops = {"plain": training(None), "hooked": training(log, overhead=overhead)}
        seconds = dict.fromkeys(loops, 0.0)
        for block in range(steps // _BLOCK):
            for name in sorted(loops, reverse=block % 2 == 0):
                began = time.perf_counter()
                for _ in range(_BLOCK):
                    next(loops[name])
                seconds[name] += time.perf_counter() - began
        for name, loop in loops.items():  # the last snapshot, and the probe that is still affordable
            began = time.perf_counter()
            loop.close()  # type: ignore[attr-defined]
            seconds[name] += time.perf_counter() - began
        summary = json.loads((log / "summary.json").read_text())
    return {
        "asked": overhead,
        "steps": steps,
        "overhead": seconds["hooked"] / seconds["plain"] - 1,
        # Not its share: that is of a clock which runs on while the other loop has its turn.
        "told": sum(summary[f"{part}_seconds"] for part in ("capture", "snapshot", "probe"))
        / seconds["plain"],
        "stride": summary["stride"],
        "rows": summary["rows"],
        "milliseconds_per_step": 1e3 * seconds["plain"] / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=630)
    parser.add_argument("--overhead", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = measure(args.steps, args.overhead)
    print(json.dumps(result, indent=1))
    document = {"date": date.today().isoformat(), "machine": machine(), **result}
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
