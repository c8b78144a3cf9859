"""What projections and half precision lose, on models that were trained for a while.

    python examples/benchmarks/quality.py [--steps 400] [--samples 100] [--seeds 5] [--quick]

Three models: a UNet on MNIST digits, and two DiTs on colour patches of two photographs, that of
the capture benchmark and one of width 384. The rank correlation (Spearman) over all pairs of samples between
projected and exact inner products, and between their cosines, stands beside that of a dense Rademacher
projection to the same D: means over seeds, and their standard deviations. Norms and gradients under bf16 and
fp16 autocast are compared with float64, beside autograd's own under the same autocast. Saves
examples/results/quality.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from scipy.stats import spearmanr
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import digits
from machine import machine
from models import digits_unet, dit

from diffhook.gradients import PerSampleGradients

RESULT = Path(__file__).parents[1] / "results" / "quality.json"
Losses = Callable[[slice], Tensor]  # rows → (b,) losses
_BLOCK = 1 << 15  # columns of a dense projection alive at once


def unet_on_digits() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    images, _ = digits()
    return digits_unet(), torch.from_numpy(images)[:, None], {}


def dit_on_patches(**config: int) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """16 × 16 patches; the fourth channel is their grey."""
    rng = np.random.default_rng(0)
    photographs = [photo.astype(np.float32) / 127.5 - 1 for photo in load_sample_images().images]
    patches = []
    for _ in range(4000):
        photo = photographs[rng.integers(2)]
        top, left = (rng.integers(size - 16) for size in photo.shape[:2])
        patches.append(photo[top : top + 16, left : left + 16])
    colours = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2)
    data = torch.cat([colours, colours.mean(1, keepdim=True)], 1)
    return dit(1, **config).model.cpu(), data, {"class_labels": torch.randint(0, 10, (len(data),))}


def wide_dit_on_patches() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """Matrices are sketched through their factors at this width; few layers are the harder case."""
    return dit_on_patches(heads=6, width=64, layers=2)


MODELS = {
    "UNet 0.9 M on MNIST digits": unet_on_digits,
    "DiT 1.4 M on colour patches": dit_on_patches,
    "DiT 5.8 M, width 384, on colour patches": wide_dit_on_patches,
}


class Problem:
    """A model, its data, and noise and timesteps drawn once for the samples that are compared."""

    def __init__(self, model: nn.Module, data: Tensor, conditions: dict[str, Tensor], samples: int) -> None:
        self.model, self.data, self.conditions = model, data, conditions
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.samples = samples
        self.noise = torch.randn_like(data[:samples])
        self.timesteps = torch.randint(0, 1000, (samples,))

    def train(self, steps: int, batch: int = 32) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for _ in range(steps):
            rows = torch.randint(0, len(self.data), (batch,))
            noise, timesteps = torch.randn_like(self.data[rows]), torch.randint(0, 1000, (batch,))
            self.losses(rows, noise, timesteps).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def losses(self, rows: Any, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(b,) mean squared errors; in the model's dtype."""
        dtype = next(self.model.parameters()).dtype
        noisy = self.scheduler.add_noise(self.data[rows], noise, timesteps).to(dtype)
        conditions = {name: value[rows] for name, value in self.conditions.items()}
        predicted = self.model(noisy, timesteps, **conditions, return_dict=False)[0]
        return (predicted[:, : noisy.shape[1]] - noise.to(dtype)).square().flatten(1).mean(1)

    def compared(self, rows: slice) -> Tensor:
        """Losses of samples among those that are compared."""
        return self.losses(rows, self.noise[rows], self.timesteps[rows])


def batches(count: int, size: int = 16) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def projected(problem: Problem, dim: Any, seed: int = 0) -> Tensor:
    """(N, D) by the engine."""
    engine = PerSampleGradients(problem.model, projection_dim=dim, seed=seed, weight_gradients=False)
    parts = []
    for rows in batches(problem.samples):
        with engine:
            problem.compared(rows).mean().backward()
        parts.append(engine.projections)
    return torch.cat(parts)


def dense(gradients: Tensor, dim: int, seed: int) -> Tensor:
    """(N, D) by a dense matrix of random signs, made and used block by block."""
    random = np.random.default_rng(seed)
    total = torch.zeros(len(gradients), dim)
    for block in gradients.split(_BLOCK, 1):
        bits = np.unpackbits(random.integers(0, 256, block.shape[1] * dim // 8, dtype=np.uint8))
        total += block @ (torch.from_numpy(bits).view(-1, dim).float() * 2 - 1)
    return total


def agreement(exact: Tensor, found: Tensor) -> dict[str, float]:
    """Spearman over pairs of different samples, of inner products and of cosines."""
    above = np.triu_indices(len(exact), 1)

    def pairs(rows: Tensor) -> np.ndarray:
        wide = rows.double()
        return (wide @ wide.T).numpy()[above]

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True)

    return {
        "inner_products": float(spearmanr(pairs(exact), pairs(found)).statistic),
        "cosines": float(spearmanr(pairs(unit(exact)), pairs(unit(found))).statistic),
    }


def half_precision(problem: Problem, dtype: torch.dtype, rows: slice = slice(0, 8)) -> dict[str, float]:
    """Relative errors against float64: the engine's under autocast, and autograd's own, sample by sample."""
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    scale = 1024.0 if dtype == torch.float16 else 1.0  # as a GradScaler does: small gradients vanish

    def loop() -> Tensor:
        found = []
        for row in range(rows.start, rows.stop):
            loss = problem.compared(slice(row, row + 1)).sum() * scale
            found.append(torch.cat([g.flatten() / scale for g in torch.autograd.grad(loss, parameters)]))
        return torch.stack(found)

    problem.model.double()
    exact = loop()
    problem.model.float()
    engine = PerSampleGradients(problem.model, projection_dim="full", weight_gradients=False)
    engine.loss_scale = scale
    with engine, torch.autocast("cpu", dtype):
        (problem.compared(rows).mean() * scale).backward()
    with torch.autocast("cpu", dtype):
        own = loop()
    return {
        "gradient": _error(engine.projections, exact),
        "gradient_autograd": _error(own, exact),
        "norm": _error(engine.norms[:, None], exact.norm(dim=1, keepdim=True)),
        "norm_autograd": _error(own.norm(dim=1, keepdim=True), exact.norm(dim=1, keepdim=True)),
    }


def _error(found: Tensor, exact: Tensor) -> float:
    """Largest over samples."""
    return float(((found.double() - exact).norm(dim=1) / exact.norm(dim=1)).max())


def spread(found: list[dict[str, float]]) -> dict[str, float]:
    """Mean over seeds of each number, and its standard deviation."""
    means = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
    return means | {f"{key}_std": float(np.std([each[key] for each in found])) for key in found[0]}


def measure(name: str, steps: int, samples: int, seeds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    problem = Problem(*MODELS[name](), samples)
    problem.train(steps)
    problem.model.eval()
    exact = projected(problem, "full")
    sketches = []
    for dim in (2048, 4096):
        ours = spread([agreement(exact, projected(problem, dim, seed)) for seed in range(seeds)])
        peer = spread([agreement(exact, dense(exact, dim, seed)) for seed in range(seeds)])
        sketches.append({"dim": dim, "ours": ours, "dense": peer})
        print(f"{name}, D = {dim}: ours {ours}, dense {peer}", flush=True)
    halves = {}
    for dtype in (torch.bfloat16, torch.float16):
        halves[str(dtype).removeprefix("torch.")] = half_precision(problem, dtype)
    print(f"{name}: {halves}", flush=True)
    return {
        "model": name,
        "steps": steps,
        "samples": samples,
        "seeds": seeds,
        "sketches": sketches,
        "half": halves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training, batch 32")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few steps and samples: does it run?")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    steps, samples, seeds = (5, 16, 2) if args.quick else (args.steps, args.samples, args.seeds)
    results = [measure(name, steps, samples, seeds) for name in MODELS]
    document = {"date": date.today().isoformat(), "machine": machine(), "results": results}
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
