"""Outlier detection on MNIST: planted samples and wrong labels, found by the log and by simpler means.

    python examples/evidence/outliers.py [--quick]

For each of five seeds two trainings. In one, on MNIST at 16 × 16 without labels, photographic patches,
inverted digits, digits with noise and blank images are planted; in the other, on scikit-learn's digits at 8 ×
8 with their classes, some labels are wrong. What the log tells (losses under other labels with neighbours'
labels, self-influence on the training's events and on a grid, norms and losses against others of their
timestep, the looks of the samples, those that count together) is set beside the plain mean loss and the
distance in pixels to the ten nearest samples (of the same label, where labels may be wrong). AUROC and
average precision, mean and standard error over seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from experiment import Result, experiment, over_seeds, told
from scipy.spatial.distance import cdist
from sources import Samples, patches, small_digits, tiny_digits
from training import LOSS, Recipe, train

import diffhook
from diffhook.analysis import Ranking
from diffhook.analysis.evaluation import detection

KINDS = ("patches", "inverted", "noisy", "blank")
Floats = npt.NDArray[np.float64]


def planted(seed: int, count: int, each: int) -> Samples:
    """Digits of which the first ``4 · each`` are planted; ``sources`` says what each sample is."""
    rng = np.random.default_rng(seed)
    digits = small_digits()
    chosen = digits.take(rng.permutation(len(digits))[:count])
    images = chosen.images.copy()
    images[:each] = patches(each, rng, size=16)[:, None]
    images[each : 2 * each] *= -1
    noise = rng.normal(0, 0.5, images[2 * each : 3 * each].shape)
    images[2 * each : 3 * each] = (images[2 * each : 3 * each] + noise).clip(-1, 1)
    images[3 * each : 4 * each] = -1
    sources = np.array(["digit"] * count, dtype=object)
    sources[: 4 * each] = np.repeat(KINDS, each)
    return replace(chosen, images=images, sources=sources)


def mislabelled(seed: int, count: int, each: int) -> Samples:
    """Class-conditional digits of which the first ``each`` have a wrong label."""
    rng = np.random.default_rng(seed)
    digits = tiny_digits()
    chosen = digits.take(rng.permutation(len(digits))[:count])
    assert chosen.labels is not None
    labels = chosen.labels.copy()
    labels[:each] = (labels[:each] + rng.integers(1, 10, each)) % 10
    sources = np.array(["wrong label"] * each + ["digit"] * (count - each), dtype=object)
    return replace(chosen, labels=labels, sources=sources)


def run(args: argparse.Namespace) -> Result:
    count, each = (64, 3) if args.quick else (1000, 25)
    found: dict[tuple[str, str], list[Any]] = {}
    for seed in args.seeds:
        for name, samples in (
            ("planted", planted(seed, count, each)),
            ("mislabelled", mislabelled(seed, count, each)),
        ):
            path = args.out / f"{name}-{seed}"
            for method, scores in rankings(args, samples, path, seed).items():
                for kind in set(samples.sources) - {"digit"}:
                    found.setdefault((kind, method), []).append(judged(scores, samples, kind))
    rows = [
        {"kind": kind, "method": method}
        | {name: over_seeds([getattr(one, name) for one in each]) for name in ("auroc", "average_precision")}
        | {"base_rate": each[0].base_rate}
        for (kind, method), each in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return {"samples": count, "of_each_kind": each, "rows": rows}


def rankings(args: argparse.Namespace, samples: Samples, path: Any, seed: int) -> dict[str, Floats]:
    """Method → (N,) scores, high for outliers."""
    recipe = Recipe(epochs=20, snapshots=2)
    recipe = recipe.quick() if args.quick else recipe
    probe = diffhook.Probe(samples=None, grid=diffhook.Grid(2 if args.quick else 5), batch_size=64)
    train(samples, recipe, seed=seed, log=path, objective=LOSS, probe=probe)
    log = diffhook.open_log(path)
    found = {
        "all signals, events": by_sample(diffhook.outliers(log, "train")),
        "all signals, grid": by_sample(diffhook.outliers(log, "probe")),
        "norm at its timestep": by_sample(diffhook.outliers(log, "train", ["norm"])),
        "loss at its timestep": by_sample(diffhook.outliers(log, "train", ["loss"])),
        "looks of the sample itself": by_sample(diffhook.outliers(log, "train", ["input"])),
        "TracIn self-influence, events": by_sample(diffhook.self_influence(log, "tracin", "train")),
        "ReTrac self-influence, events": by_sample(diffhook.self_influence(log, "retrac", "train")),
        "TracIn self-influence, grid": by_sample(diffhook.self_influence(log, "tracin", "probe")),
        "ReTrac self-influence, grid": by_sample(diffhook.self_influence(log, "retrac", "probe")),
        "mean loss, events": mean_loss(log.train, len(samples)),
        "mean loss, grid": mean_loss(log.probe, len(samples)),
        "distance in pixels": pixel_distance(samples),
    }
    if samples.classes is not None:
        found["label signals, probes"] = by_sample(diffhook.outliers(log, signals=["label"]))
    return found


def by_sample(ranking: Ranking) -> Floats:
    scores = np.empty(len(ranking))
    scores[ranking.sample_ids] = ranking.scores
    return scores


def mean_loss(table: Any, count: int) -> Floats:
    sample = table["sample"]
    found: Floats = np.bincount(sample, table["loss"], count) / np.bincount(sample, minlength=count)
    return found


def pixel_distance(samples: Samples, neighbours: int = 10) -> Floats:
    """(N,) mean distance to the nearest others, of the same label where the model knows labels."""
    flat = samples.images.reshape(len(samples), -1)
    distance = cdist(flat, flat)
    np.fill_diagonal(distance, np.inf)
    if samples.classes is not None:
        assert samples.labels is not None
        distance[samples.labels[:, None] != samples.labels] = np.inf
    found: Floats = np.sort(distance, axis=1)[:, :neighbours].mean(1)
    return found


def judged(scores: Floats, samples: Samples, kind: str) -> Any:
    """Of planted samples of one kind among the digits, the other kinds left aside."""
    kept = np.flatnonzero(np.isin(samples.sources, ["digit", kind]))
    ranking = Ranking.sort(kept, np.nan_to_num(scores[kept], posinf=1e30), [[] for _ in kept], "")
    return detection(ranking, np.flatnonzero(samples.sources == kind))


def show(result: Result) -> list[str]:
    lines = [f"{'planted':<13}{'method':<32}{'AUROC':>14}{'average precision':>20}   (at random)"]
    for row in result["rows"]:
        lines.append(
            f"{row['kind']:<13}{row['method']:<32}{told(row['auroc'], 3):>14}"
            f"{told(row['average_precision'], 3):>20}   {row['base_rate']:.3f}"
        )
    return lines


def draw(axes: Any, result: Result) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in result["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    values = {(row["kind"], row["method"]): row["auroc"]["mean"] for row in result["rows"]}
    table = np.array([[values.get((kind, method), np.nan) for method in methods] for kind in kinds])
    axes.imshow(table, vmin=0.5, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value > 0.8 else "k")
    axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_title("AUROC, mean over seeds", loc="left", fontsize=9)


if __name__ == "__main__":
    experiment("outliers", __doc__, run, draw, show, seeds=(0, 1, 2, 3, 4))
