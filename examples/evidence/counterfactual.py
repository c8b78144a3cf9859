"""Counterfactual removal: does a query fare worse without the samples that are said to have made it?

    python examples/evidence/counterfactual.py [--quick]

The class-conditional MLP of lds.py on scikit-learn's 8 × 8 digits, trained for fewer epochs. For each of 30
held-out queries and each method, the query's top 25 of 256 samples are left out, a model is trained again
from the same seed and in the same order, and the query's loss is set against that of the model trained on
all; beside it, as many left out at random. Means over queries with the bootstrap's standard error, also of
the differences from random and from pixels query by query.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from experiment import Result, experiment, told
from lds import DEFAULT, all_scores
from lds import METHODS as LDS_METHODS
from retraining import Problem, measured, train_on

from diffhook.analysis.evaluation import removal
from diffhook.analysis.evaluation.estimate import estimate

METHODS = (DEFAULT, "TracIn, grid", "pixels")
RANDOM = "at random"
Floats = npt.NDArray[np.float64]


def run(args: argparse.Namespace) -> Result:
    k = 6 if args.quick else 25
    problem = Problem.make("MLP", args.out, args.quick, asked=30, generate=False)
    if not args.quick:
        problem = replace(
            problem, setting=replace(problem.setting, recipe=replace(problem.recipe, epochs=400))
        )
    scores = all_scores(problem, 0, args.out / "log", [m for m in LDS_METHODS if m[0] in METHODS])["held out"]
    changes: dict[str, Floats] = {}
    for method in METHODS:
        top = np.argsort(-scores[method], axis=1)[:, :k]
        changes[method], changes[RANDOM] = effects(problem, top, args)
    rows = [
        {
            "method": method,
            **estimate(change)._asdict(),
            "above_random": estimate(change - changes[RANDOM])._asdict(),
            "above_pixels": estimate(change - changes["pixels"])._asdict(),
        }
        for method, change in changes.items()
    ]
    return {"training_samples": len(problem.training), "k": k, "asked": len(problem.asked), "rows": rows}


def effects(problem: Problem, top: Any, args: argparse.Namespace) -> tuple[Floats, Floats]:
    """(Q,) change of the loss without the top and without random samples, in percent of that of the model
    trained on all, which with those without random samples serves all methods."""
    found = removal(
        functools.partial(train_on, problem),
        functools.partial(measured, problem),
        top,
        len(problem.training),
        seeds=args.seeds,
        record=args.out / "removals.jsonl",
        processes=args.processes,
    )
    return tuple(100 * (losses / found.whole - 1) for losses in (found.removed, found.random))


def show(result: Result) -> list[str]:
    lines = [f"{'removed':<25}{'loss of the query, %':>22}{'above random':>18}{'above pixels':>18}"]
    for row in result["rows"]:
        lines.append(
            f"{row['method']:<25}{told(row):>22}{told(row['above_random']):>18}{told(row['above_pixels']):>18}"
        )
    return lines


def draw(axes: Any, result: Result) -> None:
    rows = result["rows"]
    names, means, errors = ([row[name] for row in rows] for name in ("method", "mean", "error"))
    axes.bar(names, means, yerr=errors)
    axes.axhline(0, color="k", lw=0.6)
    axes.set_ylabel(f"loss without {result['k']} samples, % change")


if __name__ == "__main__":
    experiment("counterfactual", __doc__, run, draw, show, seeds=(0,))
