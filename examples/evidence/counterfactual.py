"""Counterfactual removal on MNIST: does a query fare worse without the samples that are said to have made it?

    python examples/evidence/counterfactual.py [--quick]

The problem of lds.py, with class labels. For 3 held-out and 3 generated queries and each method, the
query's top 25 of 500 samples are left out, a model is trained again from the same seed and in the same
order, and the query's loss is set against that of the model trained on all; beside it, as many left out at
random. Means over queries with the bootstrap's standard error, for two training seeds.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import numpy as np
from experiment import Result, agreeing, experiment, told
from lds import METHODS as LDS_METHODS
from lds import Problem, all_scores, measured, train_on

from diffhook.analysis.evaluation import removal

METHODS = ("TracIn, grid", "ReTrac, grid", "D-TRAK", "pixels")


def run(args: argparse.Namespace) -> Result:
    k = 6 if args.quick else 25
    problem = Problem.make(True, args.out, args.quick, asked=3)
    queries = problem.queries
    scores = all_scores(problem, 0, args.out / "log", [m for m in LDS_METHODS if m[0] in METHODS])
    rows = []
    for method in METHODS:
        values = np.concatenate([scores[name][method] for name in queries])
        top = np.argsort(-values, axis=1)[:, :k]
        by_seed = [effects(problem, top, seed, args) for seed in args.seeds]
        for what in ("without the top", "without random ones"):
            seeds = [one[what] for one in by_seed]
            mean, error = (float(np.mean([one[name] for one in seeds])) for name in ("mean", "error"))
            agree = agreeing(seeds) if len(seeds) > 1 else None
            rows.append({
                "method": method, "removed": what, "mean": mean, "error": error, "each": seeds,
                "seeds_agree": agree,
            })  # fmt: skip
    return {"training_samples": len(problem.training), "k": k, "asked": len(problem.asked), "rows": rows}


def effects(problem: Problem, top: Any, seed: int, args: argparse.Namespace) -> dict[str, Result]:
    """Change of the loss, in percent of that of the model trained on all."""
    found = removal(
        functools.partial(train_on, problem),
        functools.partial(measured, problem),
        top,
        len(problem.training),
        seeds=(seed,),
        record=args.out
        / "removals.jsonl",  # the model on all and those without random ones serve all methods
        processes=args.processes,
    )
    changes = {
        "without the top": found.removed / found.whole - 1,
        "without random ones": found.random / found.whole - 1,
    }
    return {name: percent(change) for name, change in changes.items()}


def percent(change: Any) -> Result:
    rng = np.random.default_rng(0)
    means = 100 * change[rng.integers(0, len(change), (1000, len(change)))].mean(1)
    return {"mean": float(100 * change.mean()), "error": float(means.std())}


def show(result: Result) -> list[str]:
    lines = [f"{'method':<15}{'removed':<22}{'loss of the query, %':>22}   seeds agree"]
    for row in result["rows"]:
        lines.append(f"{row['method']:<15}{row['removed']:<22}{told(row):>22}   {row['seeds_agree']}")
    return lines


def draw(axes: Any, result: Result) -> None:
    rows = [row for row in result["rows"] if row["removed"] == "without the top"]
    rows.append(
        {**next(row for row in result["rows"] if row["removed"] != "without the top"), "method": "random"}
    )
    axes.bar(
        [row["method"] for row in rows], [row["mean"] for row in rows], yerr=[row["error"] for row in rows]
    )
    axes.axhline(0, color="k", lw=0.6)
    axes.set_ylabel(f"loss without {result['k']} samples, % change")


if __name__ == "__main__":
    experiment("counterfactual", __doc__, run, draw, show)
