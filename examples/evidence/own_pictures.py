"""Does a training image, asked as a query, find itself? On few pictures, few epochs, and two plain lines.

    python examples/evidence/own_pictures.py [--quick]

The 302 pictures that a user might try the tool on: two photographs cut into 200 patches, 100 digits, one
black and one noisy picture, 32 × 32 in colour. A UNet is trained on them for four epochs by an ordinary
Accelerate loop with ``DiffHook(accelerator, path)`` and no option, so that the log has four training events a
sample, and the probe of all of them at the end. Training pictures are then asked as queries, with no argument
but the images: at which rank does each find itself? By default scores go by the probe; by the events alone is
told beside it. Three minutes on two cores for a seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from experiment import Result, experiment, over_seeds, told
from sources import Samples, colour_patches, zeros_in_colour
from torch.utils.data import DataLoader
from training import NOISING, Recipe, Training, make_model

import diffhook
from diffhook.analysis.defaults import best_source
from diffhook.integrations.accelerate import DiffHook

METHODS = ("whitened-retrac", "retrac", "tracin")
SOURCES = {"train": "events alone", "probe": "two plain lines"}
K = 10


def run(args: argparse.Namespace) -> Result:
    found = [one_seed(args, seed) for seed in args.seeds]
    rows = [
        {"source": SOURCES[source], "method": method}
        | {
            "within": over_seeds([np.mean(ranks[source, method] <= K) for ranks in found]),
            "median_rank": over_seeds([np.median(ranks[source, method]) for ranks in found]),
            "worst_rank": over_seeds([np.max(ranks[source, method]) for ranks in found]),
        }
        for source, method in found[0]
    ]
    return {"training_samples": 26 if args.quick else 302, "asked": 4 if args.quick else 30, "rows": rows}


def one_seed(args: argparse.Namespace, seed: int) -> dict[tuple[str, str], npt.NDArray[np.int64]]:
    """Source and method → (Q,) the rank at which each query finds itself, from 1."""
    samples = own_pictures(np.random.default_rng(seed), 8 if args.quick else 100)
    recipe = Recipe(epochs=4, batch=16, widths=(8, 16) if args.quick else (32, 64))
    asked = np.sort(np.random.default_rng(seed).permutation(len(samples))[: 4 if args.quick else 30])
    found = {}
    path = args.out / f"seed-{seed}"
    if not path.exists():
        train(samples, recipe, seed, path)
    log = diffhook.open_log(path)
    diffhook.query(log, samples.take(asked).batch(), "own", overwrite=True)
    assert best_source(log, "own") == "probe", "two plain lines, and no more, are to be judged"
    for source in SOURCES:
        for method in METHODS:
            scores = diffhook.influence(log, "own", method, source=source)
            own = scores.values[np.arange(len(asked)), np.searchsorted(scores.sample_ids, asked)]
            found[source, method] = 1 + (scores.values > own[:, None]).sum(1)
    return found


def own_pictures(rng: np.random.Generator, count: int) -> Samples:
    """Twice ``count`` patches, ``count`` digits, a black picture and one of noise."""
    odd = np.stack([np.full((3, 32, 32), -1.0), rng.uniform(-1, 1, (3, 32, 32))]).astype(np.float32)
    images = np.concatenate([colour_patches(2 * count, rng), zeros_in_colour(count, rng), odd])
    return Samples(images)


def train(samples: Samples, recipe: Recipe, seed: int, log: Path) -> None:
    """A loop as a user has it, with two lines of ours."""
    torch.manual_seed(seed)
    AcceleratorState._reset_state(reset_partial_state=True)  # several trainings in one process
    model = make_model(samples, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate)
    loader = DataLoader(Training(samples), batch_size=recipe.batch, shuffle=True)
    accelerator = Accelerator()
    DiffHook(accelerator, log)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(recipe.epochs):
        for batch in loader:
            clean = batch["images"]
            noise, timesteps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
            predicted = model(NOISING.add_noise(clean, noise, timesteps), timesteps).sample
            accelerator.backward(torch.nn.functional.mse_loss(predicted, noise))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()


def show(result: Result) -> list[str]:
    lines = [f"{'rows':<16}{'method':<17}{f'in own top-{K}':>16}{'median rank':>16}{'worst rank':>16}"]
    for row in result["rows"]:
        figures = (told(row["within"]), told(row["median_rank"], 1), told(row["worst_rank"], 1))
        lines.append(f"{row['source']:<16}{row['method']:<17}" + "".join(f"{each:>16}" for each in figures))
    return lines


def draw(axes: Any, result: Result) -> None:
    names = [f"{row['method']}, {row['source']}" for row in result["rows"]]
    axes.bar(names, [row["within"]["mean"] for row in result["rows"]])
    axes.set_title(f"Training pictures that find themselves among their top {K}", loc="left", fontsize=9)


if __name__ == "__main__":
    experiment("own_pictures", __doc__, run, draw, show, seeds=(0, 1, 2))
