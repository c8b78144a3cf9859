"""Counterfactual removal: does a query fare worse without the samples that are said to have made it?

    python examples/evidence/counterfactual.py [--quick] [--cases '820 emoji']

On four problems: the class-conditional MLP of lds.py, trained for fewer epochs, and its class-conditional
UNet, on 256 of scikit-learn's 8 × 8 digits; and a UNet without classes on 256 and on 820 emoji at 16 × 16,
whose queries are members of families of six that differ in skin tone alone, so that what made them is known:
their siblings. Nearest in pixels are nine in ten times siblings among the 256, and three in four times among
the 820. For each of 30 or 40 held-out queries and each method, the query's top k samples are left out, 25
digits or 5 emoji, as many as a query has siblings; of the 820, those of ten queries at once. A model is
trained again from the same seed, in the same order and with the same noise for each sample, and the query's
loss is set against that of the model trained on all; beside it, as many left out at random. Means over
queries with the bootstrap's standard error, also of the differences from random and from pixels query by
query. Two and a half hours of a core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from experiment import Result, earlier, experiment, key, made_here, told
from lds import DEFAULT, all_scores
from lds import METHODS as LDS_METHODS
from retraining import SETTINGS, Problem, measured, train_on

from diffhook.analysis.evaluation import removal
from diffhook.analysis.evaluation.estimate import estimate

METHODS = (DEFAULT, "TracIn, grid", "pixels")
RANDOM, KNOWN = "at random", "siblings"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """What is trained again.

    Attributes:
        k: samples that are left out for a query.
        together: queries whose samples are left out at once.
        seeds: of the trainings, whose losses are averaged.
        known: (Q, k) what made each query, where it is known.
    """

    problem: Problem
    k: int
    together: int = 1
    seeds: tuple[int, ...] = (0,)
    known: npt.NDArray[np.int64] | None = None

    def siblings(self, top: Any) -> float | None:
        """The share of the samples in a top (Q, k) that made its query, where that is known."""
        if self.known is None or top is None:
            return None
        return float(np.mean([np.isin(some, own).mean() for some, own in zip(top, self.known, strict=True)]))


def digits(out: Path, quick: bool, *, model: str, epochs: int) -> Case:
    setting = SETTINGS[model]
    setting = replace(setting, recipe=replace(setting.recipe, epochs=epochs, paired=True))
    return Case(Problem.make(setting, out, quick, asked=30, generate=False), k=6 if quick else 25)


def emoji(
    out: Path,
    quick: bool,
    *,
    families: int,
    singles: int,
    epochs: int,
    asked: int,
    together: int = 1,
    seeds: tuple[int, ...] = (0,),
) -> Case:
    """As many are left out as a query has siblings."""
    setting = replace(SETTINGS["emoji"], families=families, singles=singles)
    setting = replace(setting, recipe=replace(setting.recipe, epochs=epochs))
    problem = Problem.make(setting, out, quick, asked=asked, generate=False)
    training, queries = problem.training, problem.queries["held out"]
    assert queries.sources is not None
    known = np.stack([np.flatnonzero(training.sources == family) for family in queries.sources])
    together, seeds = (2, (0,)) if quick else (together, seeds)
    return Case(problem, known.shape[1], together, seeds, known)


CASES: dict[str, Callable[[Path, bool], Case]] = {
    "256 digits, MLP": partial(digits, model="MLP", epochs=400),
    "256 digits, UNet": partial(digits, model="UNet", epochs=100),
    "256 emoji": partial(emoji, families=30, singles=106, epochs=60, asked=30),
    "820 emoji": partial(emoji, families=90, singles=320, epochs=30, asked=40, together=10, seeds=(0, 1, 2)),
}


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="results of others stay"
    )


def run(args: argparse.Namespace) -> Result:
    if len(args.seeds) != 1:
        raise SystemExit(f"--seeds names {len(args.seeds)}; expected one, of the training that is watched")
    found = earlier("counterfactual", args).get("cases", {})
    found |= {name: one_case(args, name) for name in args.cases}
    return {"cases": {name: found[name] for name in CASES if name in found}}


def one_case(args: argparse.Namespace, name: str) -> Result:
    out = args.out / key(name.replace(",", ""))
    out.mkdir(parents=True, exist_ok=True)
    case = CASES[name](out, args.quick)
    methods = [each for each in LDS_METHODS if each[0] in METHODS]
    (seed,) = args.seeds
    scores = all_scores(case.problem, seed, out / f"log-{seed}", methods)["held out"]
    tops = {method: np.argsort(-scores[method], axis=1)[:, : case.k] for method in METHODS}
    if case.known is not None:
        tops[KNOWN] = case.known
    changes: dict[str, Floats] = {}
    for method, top in tops.items():
        changes[method], changes[RANDOM] = effects(case, top, out, args)
    rows = [
        {
            "method": method,
            "siblings": case.siblings(tops.get(method)),
            **estimate(change)._asdict(),
            "above_random": estimate(change - changes[RANDOM])._asdict(),
            "above_pixels": estimate(change - changes["pixels"])._asdict(),
        }
        for method, change in changes.items()
    ]
    return {
        "k": case.k, "asked": len(case.problem.asked), "trainings": len(case.seeds), "rows": rows,
        **made_here(),
    }  # fmt: skip


def effects(case: Case, top: Any, out: Path, args: argparse.Namespace) -> tuple[Floats, Floats]:
    """(Q,) change of the loss without the top and without random samples, in percent of that of the model
    trained on all, which with those without random samples serves all methods."""
    found = removal(
        partial(train_on, case.problem),
        partial(measured, case.problem),
        top,
        len(case.problem.training),
        seeds=case.seeds,
        together=case.together,
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
    names = list(dict.fromkeys(row["method"] for found in result["cases"].values() for row in found["rows"]))
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
    titles = [f"{found['k']} of {name}" for name, found in result["cases"].items()]
    axes.set_xticks(middles, titles)
    axes.set(ylabel="loss of the query, % change", yscale="symlog")
    axes.set_title("Without the samples that are said to have made a query", loc="left", fontsize=9)
    axes.legend(frameon=False)


if __name__ == "__main__":
    experiment("counterfactual", __doc__, run, draw, show, seeds=(0,), more=more)
