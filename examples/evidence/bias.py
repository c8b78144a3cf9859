"""The timestep-induced bias on MNIST, and what ReTrac does about it (arXiv 2401.09031, sections 4 and 5).

    python examples/evidence/bias.py [--quick]

An unconditional UNet is trained on digits while every step is captured. For each seed: gradient norm against
timestep with their rank correlation; for queries held out and generated, under TracIn, ReTrac and whitened
ReTrac, how many of the queries' top-10 drew one of the first timesteps, where norms are largest, how
different they are (cardinality), how many samples are in the top-10 of more than a fifth of the queries, and,
because a random ranking has perfect cardinality, how often the top-10 carry the query's label. On events
replayed as in the paper, one of each sample, at the trained model alone and at all four snapshots, and on the
training's own. An hour.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from experiment import Result, experiment, key, over_seeds, told
from replay import replayed
from sklearn.neighbors import KNeighborsClassifier
from sources import Samples, small_digits, split
from training import LOSS, Recipe, generate, train

import diffhook
from diffhook.analysis.bias import generality
from diffhook.analysis.evaluation import tracing

METHODS = ("tracin", "retrac", "whitened-retrac")
K, GENERAL = 10, 0.2
EARLY = 20  # timesteps, of 1,000


def run(args: argparse.Namespace) -> Result:
    found = [one_seed(args, seed) for seed in args.seeds]
    rows = []
    for queries in ("held out", "generated"):
        for events, method in found[0]["queries"][queries]:
            each = [run["queries"][queries][events, method] for run in found]
            values = {name: over_seeds([one[name] for one in each]) for name in each[0]}
            rows.append({"queries": queries, "events": events, "method": method, **values})
    return {
        "training_samples": found[0]["training_samples"],
        "asked": found[0]["asked"],
        "early": EARLY,
        "correlation": over_seeds([one["correlation"] for one in found]),
        "p_value": max(one["p_value"] for one in found),
        "norms": found[0]["norms"],
        "rows": rows,
    }


def one_seed(args: argparse.Namespace, seed: int) -> Result:
    training, held_out = split(small_digits(), *((64, 4) if args.quick else (4000, 64)), seed=seed)
    recipe = Recipe(epochs=12)
    recipe = recipe.quick() if args.quick else recipe
    path = args.out / f"seed-{seed}"
    model = train(training, recipe, seed=seed, log=path)
    made = generate(model, training, len(held_out), steps=2 if args.quick else 50)
    nearest = KNeighborsClassifier(5).fit(_flat(training), training.labels)
    labels = {"held out": held_out.labels, "generated": nearest.predict(_flat(made))}
    log = diffhook.open_log(path)
    report = diffhook.bias(log, queries=())
    grid = diffhook.Grid(2) if args.quick else None
    for name, asked in (("held out", held_out), ("generated", made)):
        diffhook.query(log, asked.batch(), key(name), LOSS, grid=grid, overwrite=True)
    once = replayed(log, training, model, args.out / f"once-{seed}", last=1)
    several = replayed(log, training, model, args.out / f"replayed-{seed}")
    sets = {"replayed once": once, "replayed": several, "own": log}
    early = {events: drew_early(of_events) for events, of_events in sets.items()}
    found: dict[str, Any] = {name: {} for name in labels}
    for name, of_name in found.items():
        for events, method in itertools.product(sets, METHODS):
            scores = diffhook.influence(sets[events], key(name), method)
            alike = generality(scores, name, K, GENERAL)
            top = scores.top(K).sample_ids
            own = tracing(top, training.labels, labels[name])
            of_name[events, method] = {
                "early": float(np.isin(top, early[events]).mean()),
                "early_chance": len(early[events]) / len(training),
                "cardinality": alike.cardinality,
                "general_samples": alike.general_samples,
                "own_label": own.precision.mean,
                "chance": own.chance,
            }
    norms = [vars(each) for each in report.norms]
    return {
        "training_samples": len(training), "asked": len(held_out), "correlation": report.correlation,
        "p_value": report.p_value, "norms": norms, "queries": found,
    }  # fmt: skip


def drew_early(log: diffhook.RunLog) -> npt.NDArray[np.int64]:
    """Ids of the samples one of whose events drew a timestep below ``EARLY``."""
    return np.unique(log.train["sample"][log.train["timestep"] < EARLY])


def _flat(samples: Samples) -> Any:
    return samples.images.reshape(len(samples), -1)


def show(result: Result) -> list[str]:
    lines = [
        f"timestep against norm: Spearman {told(result['correlation'])}, p ≤ {result['p_value']:.0e}",
        f"{'queries':<11}{'events':<15}{'method':<17}{'drew early':>14}  (chance){'cardinality':>14}"
        f"{'general samples':>18}{'own label':>14}  (chance)",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['queries']:<11}{row['events']:<15}{row['method']:<17}{told(row['early']):>14}"
            f"  {row['early_chance']['mean']:8.2f}{told(row['cardinality']):>14}"
            f"{told(row['general_samples'], 1):>18}{told(row['own_label']):>14}  {row['chance']['mean']:.2f}"
        )
    return lines


def draw(axes: Any, result: Result) -> None:
    norms = result["norms"]
    middle = np.array([(each["low"] + each["high"]) / 2 for each in norms])
    axes.fill_between(
        middle, [each["lower"] for each in norms], [each["upper"] for each in norms], alpha=0.25, lw=0
    )
    axes.plot(middle, [each["median"] for each in norms])
    axes.set(xlabel="timestep drawn in training", ylabel="gradient norm", yscale="log")
    axes.set_title("Median and 10–90% of the samples' gradient norms, first seed", loc="left", fontsize=9)


if __name__ == "__main__":
    experiment("bias", __doc__, run, draw, show, seeds=(0, 1, 2))
