"""Train a diffusion model on MNIST in which 100 foreign samples are planted; find them; ask what made
eight held-out and eight generated digits. About four minutes on two CPU cores.

    python examples/mnist.py

The training loop is an ordinary one; the two lines of diffhook are marked. Everything lands in
runs/mnist: the log, page.html, outliers.csv, outliers.json, influence-*.csv and result.json.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from data import CLEAN, DAMAGED, PATCH, PlantedDigits, planted_digits
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from machine import machine
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

import diffhook
from diffhook.analysis import Scores
from diffhook.integrations.accelerate import DiffHook
from diffhook.report import write_page


def make_model() -> UNet2DModel:
    """0.9 M parameters, three resolutions, attention at the lowest."""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def train(data: PlantedDigits, log: Path, epochs: int, batch_size: int, **options: Any) -> UNet2DModel:
    """A plain Accelerate loop."""
    torch.manual_seed(0)
    images = torch.from_numpy(data.images)[:, None]
    loader = DataLoader(TensorDataset(images), batch_size=batch_size, shuffle=True)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rates = get_cosine_schedule_with_warmup(optimizer, 50, epochs * len(loader))

    accelerator = Accelerator()
    DiffHook(accelerator, log, snapshot_every=len(loader), **options)  # line two; line one imports it
    model, optimizer, loader, rates = accelerator.prepare(model, optimizer, loader, rates)

    bar = tqdm(total=epochs * len(loader), desc="training", disable=None)
    for _ in range(epochs):
        for (clean,) in loader:
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device)
            predicted = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            loss = F.mse_loss(predicted, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.4f}")
            bar.update()
    bar.close()
    accelerator.end_training()
    return accelerator.unwrap_model(model)


@torch.no_grad()
def generate(model: UNet2DModel, count: int, steps: int = 50) -> torch.Tensor:
    """Images sampled with DDIM, (count, 1, 28, 28) in [−1, 1]."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps)
    device = next(model.parameters()).device
    images = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(7)).to(device)
    for timestep in tqdm(scheduler.timesteps, desc="sampling", disable=None, leave=False):
        images = scheduler.step(model(images, timestep).sample, timestep, images).prev_sample
    return images.clamp(-1, 1).cpu()


def detection(ranking: Any, data: PlantedDigits) -> dict[str, float]:
    """How well a ranking finds the planted samples: AUROC and average precision, by kind."""
    score = np.empty(len(data.kinds))
    score[ranking.sample_ids] = np.nan_to_num(ranking.scores, posinf=1e30)
    found = {}
    for name, kinds in (("all", (PATCH, DAMAGED)), ("patches", (PATCH,)), ("damaged", (DAMAGED,))):
        rows = (data.kinds == CLEAN) | np.isin(data.kinds, kinds)
        planted = data.kinds[rows] != CLEAN
        found[f"auroc_{name}"] = float(roc_auc_score(planted, score[rows]))
        found[f"ap_{name}"] = float(average_precision_score(planted, score[rows]))
    return found


def label_share(scores: Scores, labels: np.ndarray, data: PlantedDigits) -> float:
    """Share of the queries' top-10 proponents that carry the query's label."""
    top = scores.top(10).sample_ids
    return float((data.labels[top] == labels[scores.query_ids][:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, default=5000, help="use this many digits, for a quick look")
    parser.add_argument("--overhead", type=float, help="capture within this share of the training time")
    args = parser.parse_args()
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)

    data = planted_digits(limit=args.limit)
    options = {} if args.overhead is None else {"overhead": args.overhead}
    model = train(data, args.out / "log", args.epochs, args.batch_size, **options)
    generated = generate(model, 8)

    log = diffhook.open_log(args.out / "log")
    objective = diffhook.DiffusionObjective(DDPMScheduler(num_train_timesteps=1000))
    held_out = torch.from_numpy(data.held_out)[:, None]
    knn = KNeighborsClassifier(5).fit(
        data.images[data.kinds == CLEAN].reshape(-1, 784), data.labels[data.kinds == CLEAN]
    )
    asked = {
        "held-out": (held_out, data.held_out_labels),
        "generated": (generated, knn.predict(generated.numpy().reshape(-1, 784))),  # as k-NN reads them
    }
    ranking = diffhook.outliers(log)
    by_norm = diffhook.outliers(log, parts=["norm"])
    result: dict[str, Any] = {"outliers": detection(by_norm, data), "all_signals": detection(ranking, data)}
    result["self_influence_tracin"] = detection(diffhook.self_influence(log, "tracin"), data)
    for name, (images, labels) in asked.items():
        diffhook.query(log, images, name, objective, overwrite=True)
        scores = [diffhook.influence(log, name, method) for method in ("tracin", "retrac")]
        for each in scores:
            each.to_csv(args.out / f"influence-{name}-{each.method}.csv", k=100)
            result[f"label_share_{name}_{each.method}"] = label_share(each, labels, data)
    report = diffhook.bias(log)
    result["timestep_norm_correlation"] = report.correlation
    for g in report.generality:
        result[f"cardinality_{g.queries}_{g.method}"] = g.cardinality

    ranking.to_csv(args.out / "outliers.csv")
    ranking.to_json(args.out / "outliers.json")
    write_page(
        args.out / "page.html",
        log,
        ranking,
        data.images,
        queries={name: images for name, (images, _) in asked.items()},
        title="diffhook: MNIST with planted samples",
    )
    result["seconds"] = round(time.perf_counter() - began, 1)
    result |= {"date": date.today().isoformat(), "machine": machine(), "epochs": args.epochs}
    result["noise"] = "anew at every timestep"  # tables of results without it are marked as outdated
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    show(result, args.out)


def show(result: dict[str, Any], out: Path) -> None:
    """The numbers, whatever they turned out to be."""
    found, every, pull = (result[key] for key in ("outliers", "all_signals", "self_influence_tracin"))
    print("\nplanted samples found among the digits          AUROC   average precision")
    for kind in ("all", "patches", "damaged"):
        line = f"{found[f'auroc_{kind}']:.3f}   {found[f'ap_{kind}']:.3f}"
        print(f"  standardised norm, {kind:<26}   {line}")
    print(
        f"  all signals together, all                       {every['auroc_all']:.3f}   {every['ap_all']:.3f}"
    )
    print(f"  TracIn self-influence, all                      {pull['auroc_all']:.3f}   {pull['ap_all']:.3f}")
    print("\n                                                TracIn   ReTrac")
    for name in ("held-out", "generated"):
        for label, key in (
            ("top-10 cardinality", "cardinality"),
            ("top-10 with the query's label", "label_share"),
        ):
            values = [result[f"{key}_{name}_{method}"] for method in ("tracin", "retrac")]
            print(f"  {label + ', ' + name:<44}  {values[0]:.3f}    {values[1]:.3f}")
    print(f"\nrank correlation of timestep and gradient norm: {result['timestep_norm_correlation']:+.3f}")
    print(f"{result['seconds']:.0f} s in all. Open {out / 'page.html'}")


if __name__ == "__main__":
    main()
