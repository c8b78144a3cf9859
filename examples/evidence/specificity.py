"""Do queries get samples of their own? Label share and cardinality of the top-10, by method and source.

    python examples/evidence/specificity.py [--quick]

A class-conditional UNet is trained on scikit-learn's 8 × 8 digits, every step captured, with probes at four
snapshots. For digits held out: the share of the top-10 with the query's label, how different the queries'
tops are (cardinality), and how many samples are in the tops of more than a fifth of the queries; on the
training's own events, where queries have noise of their own, all of them (ten a sample and snapshot) or one
in ten, about as many as the paper replays; and on probes, which share their noise with the queries. Beside
them stand the nearest images in pixels, and samples at random of the query's label, which are as different
as tops that have it can be. Four minutes on two cores for a seed.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt
from experiment import Result, experiment, over_seeds, told
from sources import Samples, split, tiny_digits
from training import LOSS, Recipe, train

import diffhook
from diffhook.analysis.bias import cardinality, general_samples
from diffhook.analysis.effective_dimension import effective_dimension
from diffhook.analysis.evaluation import tracing

METHODS = ("tracin", "retrac", "cosine", "trak", "whitened-retrac")
SOURCES = {"train": "events", "probe": "probes"}
FEW, EVERY = "a tenth", 10  # of the events
K, GENERAL = 10, 0.2


def run(args: argparse.Namespace) -> Result:
    found = [one_seed(args, seed) for seed in args.seeds]
    rows = [
        {"source": source, "method": method}
        | {
            name: over_seeds([one[source, method][name] for one in found])
            for name in found[0][source, method]
        }
        for source, method in found[0]
    ]
    return {"training_samples": 60 if args.quick else 500, "asked": 4 if args.quick else 40, "rows": rows}


def one_seed(args: argparse.Namespace, seed: int) -> dict[tuple[str, str], dict[str, float]]:
    training, held_out = split(tiny_digits(), *((60, 4) if args.quick else (500, 40)), seed=seed)
    grid = diffhook.Grid(2 if args.quick else 10, replicates=2)
    probe = diffhook.Probe(samples=None, grid=grid, batch_size=64, label_timesteps=0)
    log = watched(args, seed, training, held_out, objective=LOSS, probe=probe)
    few = watched(args, seed, training, held_out, grid=grid, every=EVERY)
    print(effective_dimension(log))
    found = {}
    sources = [(log, source, title) for source, title in SOURCES.items()]
    for run, source, title in [*sources, (few, "train", FEW)]:
        for method in METHODS:
            top = diffhook.influence(run, "held-out", method, source).top(K).sample_ids
            found[title, method] = figures(top, training, held_out)
    flat, own = (samples.images.reshape(len(samples), -1) for samples in (held_out, training))
    nearest = np.argsort(((flat[:, None] - own[None]) ** 2).sum(2), axis=1)[:, :K]
    found["images", "pixels"] = figures(nearest, training, held_out)
    found["labels", "random of the label"] = figures(of_label(training, held_out, seed), training, held_out)
    return found


def watched(
    args: argparse.Namespace,
    seed: int,
    training: Samples,
    held_out: Samples,
    grid: diffhook.Grid | None = None,
    **options: Any,
) -> diffhook.RunLog:
    """The log of a training, and the queries' gradients in it."""
    recipe = Recipe(epochs=40, batch=16, widths=(16, 32), snapshots=4)
    recipe = recipe.quick() if args.quick else recipe
    path = args.out / f"seed-{seed}-{'-'.join(sorted(options))}"
    train(training, recipe, seed=seed, log=path, **options)
    log = diffhook.open_log(path)
    diffhook.query(log, held_out.batch(), "held-out", LOSS, grid=grid, batch_size=64, overwrite=True)
    return log


def of_label(training: Samples, asked: Samples, seed: int) -> npt.NDArray[np.int64]:
    """(Q, K) samples at random of each query's label: as different as tops of the right label can be."""
    rng = np.random.default_rng(seed)
    assert asked.labels is not None
    picked = [rng.permutation(np.flatnonzero(training.labels == label))[:K] for label in asked.labels]
    least = min(len(ids) for ids in picked)
    return np.stack([ids[:least] for ids in picked])


def figures(top: Any, training: Samples, asked: Samples) -> dict[str, float]:
    assert training.labels is not None
    assert asked.labels is not None
    return {
        "own_label": tracing(top, training.labels, asked.labels).precision.mean,
        "cardinality": cardinality(top),
        "general_samples": general_samples(top, GENERAL),
    }


def show(result: Result) -> list[str]:
    lines = [f"{'rows':<8}{'method':<17}{'own label':>14}{'cardinality':>14}{'general samples':>18}"]
    for row in result["rows"]:
        lines.append(
            f"{row['source']:<8}{row['method']:<17}{told(row['own_label']):>14}"
            f"{told(row['cardinality']):>14}{told(row['general_samples'], 1):>18}"
        )
    return lines


def draw(axes: Any, result: Result) -> None:
    names = [f"{row['method']}, {row['source']}" for row in result["rows"]]
    place = np.arange(len(names))
    for offset, figure, title in (
        (-0.2, "own_label", "of the query's label"),
        (0.2, "cardinality", "cardinality"),
    ):
        axes.bar(place + offset, [row[figure]["mean"] for row in result["rows"]], 0.38, label=title)
    axes.set_xticks(place, names, rotation=30, ha="right")
    axes.set_title("Top-10 of queries that were held out", loc="left", fontsize=9)
    axes.legend(frameon=False)


if __name__ == "__main__":
    experiment("specificity", __doc__, run, draw, show, seeds=(0, 1, 2))
