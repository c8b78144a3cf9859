"""Counterfactual removal: does a query fare worse without the samples that are said to have made it?

    python examples/evidence/counterfactual.py [--quick]

On two kinds of pictures: the class-conditional MLP of lds.py on scikit-learn's 8 × 8 digits, trained for
fewer epochs; and a UNet on emoji at 16 × 16, whose queries are members of families of six that differ in skin
tone alone, so that what made them is known: their siblings. For each of 30 held-out queries and each method,
the query's top k of 256 samples are left out, 25 digits or 5 emoji, as many as a query has siblings. A model
is trained again from the same seed, in the same order and with the same noise for each sample, and the
query's loss is set against that of the model trained on all; beside it, as many left out at random. Means
over queries with the bootstrap's standard error, also of the differences from random and from pixels query by
query. An hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from experiment import Result, experiment, told
from lds import DEFAULT, all_scores
from lds import METHODS as LDS_METHODS
from retraining import SIBLINGS, Problem, measured, train_on

from diffhook.analysis.evaluation import removal
from diffhook.analysis.evaluation.estimate import estimate

METHODS = (DEFAULT, "TracIn, grid", "pixels")
RANDOM, KNOWN = "at random", "siblings"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """What is trained again, how many samples are left out, and which made each query, where it is known."""

    problem: Problem
    k: int
    known: npt.NDArray[np.int64] | None = None


def digits(out: Path, quick: bool) -> Case:
    problem = Problem.make("MLP", out, quick, asked=30, generate=False)
    setting = problem.setting
    if not quick:
        setting = replace(setting, recipe=replace(setting.recipe, epochs=400))
    return Case(replace(problem, setting=setting), k=6 if quick else 25)


def emoji(out: Path, quick: bool) -> Case:
    problem = Problem.make("emoji", out, quick, asked=30, generate=False)
    training, asked = problem.training, problem.queries["held out"]
    assert asked.sources is not None
    known = np.stack([np.flatnonzero(training.sources == family) for family in asked.sources])
    return Case(problem, SIBLINGS, known)


CASES: dict[str, Callable[[Path, bool], Case]] = {"digits": digits, "emoji": emoji}


def run(args: argparse.Namespace) -> Result:
    return {"cases": {name: one_case(args, name) for name in CASES}}


def one_case(args: argparse.Namespace, name: str) -> Result:
    out = args.out / name
    out.mkdir(parents=True, exist_ok=True)
    case = CASES[name](out, args.quick)
    methods = [each for each in LDS_METHODS if each[0] in METHODS]
    scores = all_scores(case.problem, 0, out / "log", methods)["held out"]
    tops = {method: np.argsort(-scores[method], axis=1)[:, : case.k] for method in METHODS}
    if case.known is not None:
        tops[KNOWN] = case.known
    changes: dict[str, Floats] = {}
    for method, top in tops.items():
        changes[method], changes[RANDOM] = effects(case.problem, top, out, args)
    rows = [
        {
            "method": method,
            **estimate(change)._asdict(),
            "above_random": estimate(change - changes[RANDOM])._asdict(),
            "above_pixels": estimate(change - changes["pixels"])._asdict(),
        }
        for method, change in changes.items()
    ]
    training, asked = case.problem.training, case.problem.asked
    return {"training_samples": len(training), "k": case.k, "asked": len(asked), "rows": rows}


def effects(problem: Problem, top: Any, out: Path, args: argparse.Namespace) -> tuple[Floats, Floats]:
    """(Q,) change of the loss without the top and without random samples, in percent of that of the model
    trained on all, which with those without random samples serves all methods."""
    found = removal(
        functools.partial(train_on, problem),
        functools.partial(measured, problem),
        top,
        len(problem.training),
        seeds=args.seeds,
        record=out / "removals.jsonl",
        processes=args.processes,
    )
    removed, random = (100 * (losses / found.whole - 1) for losses in (found.removed, found.random))
    return removed, random


def show(result: Result) -> list[str]:
    lines = []
    for name, found in result["cases"].items():
        lines.append(
            f"{name + ', removed':<25}{'loss of the query, %':>22}{'above random':>18}{'above pixels':>18}"
        )
        for row in found["rows"]:
            above = f"{told(row['above_random']):>18}{told(row['above_pixels']):>18}"
            lines.append(f"{row['method']:<25}{told(row):>22}{above}")
    return lines


def draw(axes: Any, result: Result) -> None:
    names = [row["method"] for row in result["cases"]["emoji"]["rows"]]
    middles = np.arange(len(result["cases"]))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        of_name = [
            (middle + (place - (len(names) - 1) / 2) * width, row)
            for middle, found in zip(middles, result["cases"].values(), strict=True)
            for row in found["rows"]
            if row["method"] == name
        ]
        left, heights, errors = zip(*((x, row["mean"], row["error"]) for x, row in of_name), strict=True)
        axes.bar(left, heights, width, yerr=errors, label=name)
    axes.axhline(0, color="k", lw=0.6)
    titles = [
        f"{found['k']} of {found['training_samples']} {name}" for name, found in result["cases"].items()
    ]
    axes.set_xticks(middles, titles)
    axes.set(ylabel="loss of the query, % change", yscale="symlog")
    axes.set_title("Without the samples that are said to have made a query", loc="left", fontsize=9)
    axes.legend(frameon=False)


if __name__ == "__main__":
    experiment("counterfactual", __doc__, run, draw, show, seeds=(0,))
