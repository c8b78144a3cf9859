"""Image tracing in a mixture (arXiv 2401.09031, section 5): does what made an image come from its own source?

    python examples/evidence/tracing.py [--quick] [--mnist] [--cifar FOLDER]

One UNet is trained on 1,000 of scikit-learn's 8 × 8 digits and 40 grey patches of two photographs, as few
foreign images as in the paper, at a constant learning rate and with ten snapshots. Patches have the larger
gradients, so a score that their norms rule names them for queries that are digits. Queries: digits of the
training, digits held out, and generated images. For each method the share of the top-6 that comes from the
other source, where it should be none: on events replayed at the snapshots, one of each sample, as in the
paper, and on the training's own events. Generated images count as digits or patches as the nearest training
image is one. With --mnist, MNIST at 16 × 16 takes the place of the digits; with a folder of CIFAR-10 (binary
version), 5,000 planes and 200 zeros take that of digits and patches, as in the paper.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from experiment import Result, experiment, key, over_seeds, told
from replay import replayed
from sources import Samples, cifar_planes, patches, small_digits, tiny_digits, zeros_in_colour
from training import LOSS, Recipe, generate, train

import diffhook
from diffhook.analysis.bias import general_samples
from diffhook.analysis.evaluation import tracing

METHODS = ("tracin", "retrac", "cosine", "trak", "whitened-retrac")
QUERIES = ("training", "held out", "generated")
K, GENERAL = 6, 0.2


def mixture(args: argparse.Namespace, seed: int) -> tuple[Samples, Samples]:
    """What is trained on, first source first, and some of the first source that are not."""
    rng = np.random.default_rng(seed)
    asked = 4 if args.quick else 24
    if args.cifar:
        images = cifar_planes(args.cifar)
        many = len(images) - asked
        foreign = zeros_in_colour(200, rng)
    else:
        images = (small_digits() if args.mnist else tiny_digits()).images
        many, few = (60, 4) if args.quick else (1000, 40)
        foreign = patches(few, rng, size=images.shape[-1])[:, None]
    images = images[rng.permutation(len(images))[: many + asked]]
    sources = np.repeat([0, 1], [many, len(foreign)])
    return Samples(np.concatenate([images[:many], foreign]), sources=sources), Samples(images[many:])


def run(args: argparse.Namespace) -> Result:
    found = [one_seed(args, seed) for seed in args.seeds]
    rows = []
    for queries in QUERIES:
        for events, method in found[0][queries]:
            each = [one[queries][events, method] for one in found]
            rows.append({
                "queries": queries,
                "events": events,
                "method": method,
                **{name: over_seeds([one[name] for one in each]) for name in each[0]},
            })  # fmt: skip
    first = "CIFAR-10 planes" if args.cifar else "MNIST" if args.mnist else "digits"
    return {"k": K, "first_source": first, "rows": rows, "asked": found[0]["asked"]}


def one_seed(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    training, held_out = mixture(args, seed)
    widths = (16, 32, 32) if args.cifar or args.mnist else (16, 32)
    recipe = Recipe(epochs=30, rate=1e-3, constant=True, widths=widths, snapshots=10)
    recipe = recipe.quick() if args.quick else recipe
    path = args.out / f"seed-{seed}"
    model = train(training, recipe, seed=seed, log=path)
    made = generate(model, training, len(held_out), steps=2 if args.quick else 50)
    log = diffhook.open_log(path)
    grid = diffhook.Grid(2) if args.quick else None
    first = np.flatnonzero(training.sources == 0)
    some = training.take(np.random.default_rng(seed).permutation(first)[: len(held_out)])
    queries = dict(zip(QUERIES, (some, held_out, made), strict=True))
    for name, asked in queries.items():
        diffhook.query(log, asked.batch(), key(name), LOSS, grid=grid, overwrite=True)
    sets = {"replayed": replayed(log, training, model, args.out / f"replayed-{seed}"), "own": log}
    found: dict[str, Any] = {"asked": len(held_out)}
    for name, asked in queries.items():
        near = nearest(training, asked)
        sources = training.sources[near[:, 0]] if name == "generated" else np.zeros(len(asked), int)
        tops = {
            (events, method): diffhook.influence(of_events, key(name), method).top(K).sample_ids
            for events, of_events in sets.items()
            for method in METHODS
        }
        tops["", "pixels"] = near[:, :K]
        tops["", "random"] = np.random.default_rng(seed).integers(0, len(training), (len(asked), K))
        found[name] = {}
        for way, top in tops.items():
            told = tracing(top, training.sources, sources)
            found[name][way] = {
                "wrong": 1 - told.precision.mean,
                "cardinality": told.cardinality,
                "general_samples": general_samples(top, GENERAL),
            }
    return found


def nearest(training: Samples, asked: Samples, k: int = K) -> npt.NDArray[np.int64]:
    """(Q, k) ids of the nearest training images, by the distance of their pixels."""
    train, query = (each.images.reshape(len(each), -1) for each in (training, asked))
    distance = (train**2).sum(1) - 2 * query @ train.T
    return np.argsort(distance, axis=1)[:, :k]


def show(result: Result) -> list[str]:
    lines = [f"{'queries':<12}{'events':<10}{'method':<17}{'wrong source in top-6':>24}{'cardinality':>15}"]
    for row in result["rows"]:
        lines.append(
            f"{row['queries']:<12}{row['events']:<10}{row['method']:<17}{told(row['wrong'], 3):>24}"
            f"{told(row['cardinality']):>15}"
        )
    return lines


def draw(axes: Any, result: Result) -> None:
    methods = list(dict.fromkeys((row["events"], row["method"]) for row in result["rows"]))
    for offset, queries in enumerate(QUERIES):
        rows = [row for row in result["rows"] if row["queries"] == queries]
        place = np.arange(len(methods)) + (offset - 1) * 0.27
        errors = [np.nan_to_num(row["wrong"]["error"]) for row in rows]
        axes.bar(place, [row["wrong"]["mean"] for row in rows], 0.25, yerr=errors, label=queries)
    named = [f"{method}, {events}" if events else method for events, method in methods]
    axes.set_xticks(range(len(methods)), named, rotation=30, ha="right")
    axes.set_ylabel("wrong source in the top-6")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mnist", action="store_true", help="MNIST at 16 × 16 in place of 8 × 8 digits")
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10's binary version")


def other_images(args: argparse.Namespace) -> bool:
    return args.mnist or args.cifar is not None


if __name__ == "__main__":
    experiment("tracing", __doc__, run, draw, show, seeds=(0, 1, 2), more=more, other=other_images)
