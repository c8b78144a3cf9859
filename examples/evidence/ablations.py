"""What the defaults are worth: LDS and rank agreement against timesteps, noise, D, snapshots and stride.

    python examples/evidence/ablations.py [--quick]

The problem of lds.py without class labels, with 300 digits and their own retrained halves. One thing at a
time is changed from a reference: a grid of 10 timesteps × 1 draw, D = 2048, 2 snapshots, every step
captured. For TracIn and ReTrac: the LDS over held-out queries, and the Spearman correlation of all scores
with those of the finest setting of that thing. Training is bit-identical whatever is captured, so all
settings watch the same model.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from experiment import Result, experiment, told
from lds import Problem, ask, key, retrained
from scipy.stats import spearmanr
from training import LOSS, train

import diffhook
from diffhook.analysis import Scores
from diffhook.analysis.evaluation import lds

METHODS = ("tracin", "retrac")
REFERENCE = {"timesteps": 10, "noise draws": 1, "D": 2048, "snapshots": 2, "stride": 1}
SETTINGS = {
    "timesteps": (2, 5, 10, 20, 40),
    "noise draws": (1, 2, 4, 8),
    "D": (128, 512, 2048, 8192),
    "snapshots": (1, 2, 4, 8),
    "stride": (1, 2, 4, 8, 16),
}
QUICK = {"timesteps": (2, 3), "noise draws": (1, 2), "D": (64, 128), "snapshots": (1, 2), "stride": (1, 2)}


class Study:
    """One watched model per seed, scored in many ways."""

    def __init__(self, problem: Problem, seed: int, out: Path) -> None:
        self.problem, self.seed, self.out = problem, seed, out

    def scores(self, thing: str, setting: dict[str, int]) -> dict[str, npt.NDArray[Any]]:
        """Method → (Q, N): of events where the stride is asked about, on the grid otherwise."""
        problem = replace(
            self.problem,
            grid=diffhook.Grid(setting["timesteps"], draws=setting["noise draws"]),
            recipe=replace(self.problem.recipe, snapshots=setting["snapshots"]),
        )
        path = self.out / f"seed-{self.seed}-{key(thing)}-{setting[thing]}"
        events = thing == "stride"
        options: dict[str, Any] = {"every": setting["stride"] if events else 10**9}
        if not events:
            options["objective"] = LOSS
            options["probe"] = diffhook.Probe(samples=None, grid=problem.grid, batch_size=64)
        train(
            problem.training, problem.recipe, seed=self.seed, log=path, projection_dim=setting["D"], **options
        )
        log = diffhook.open_log(path)
        ask(log, problem.queries["held out"], "held out", problem)
        source = "train" if events else "probe"
        return {
            method: self.of_all(diffhook.influence(log, "held-out", method, source)) for method in METHODS
        }

    def of_all(self, scores: Scores) -> npt.NDArray[Any]:
        """(Q, N): 0 for samples that no captured step saw."""
        found = np.zeros((len(scores.query_ids), len(self.problem.training)))
        found[:, scores.sample_ids] = scores.values
        return found


def run(args: argparse.Namespace) -> Result:
    problem = Problem.make(False, args.out, args.quick, samples=300)
    models = retrained(problem, args, args.out)
    measured = -models.losses[:, :, : len(problem.queries["held out"])]
    rows = []
    for seed in args.seeds:
        study = Study(problem, seed, args.out)
        for thing, values in (QUICK if args.quick else SETTINGS).items():
            found = {}
            for value in values:
                setting = {**REFERENCE, thing: value}
                if args.quick:
                    setting |= {name: QUICK[name][0] for name in QUICK if name != thing}
                found[value] = study.scores(thing, setting)
            finest = found[values[0] if thing == "stride" else values[-1]]
            for (value, scores), method in itertools.product(found.items(), METHODS):
                score = lds(scores[method], models.subsets, measured)
                rank = np.mean(
                    [spearmanr(a, b)[0] for a, b in zip(scores[method], finest[method], strict=True)]
                )
                rows.append({
                    "seed": seed, "thing": thing, "value": value, "method": method, "mean": score.mean.mean,
                    "error": score.mean.error, "rank_agreement": float(rank),
                })  # fmt: skip
    return {"training_samples": len(problem.training), "reference": REFERENCE, "rows": rows}


def show(result: Result) -> list[str]:
    lines = [
        f"{'changed':<13}{'value':>6}  {'method':<8}{'seed':>5}{'LDS':>17}   rank agreement with the finest"
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['thing']:<13}{row['value']:>6}  {row['method']:<8}{row['seed']:>5}{told(row, 3):>17}"
            f"   {row['rank_agreement']:.3f}"
        )
    return lines


def draw(axes: Any, result: Result) -> None:
    for thing in SETTINGS:
        rows = [r for r in result["rows"] if r["thing"] == thing and r["method"] == "retrac"]
        values = sorted({row["value"] for row in rows})
        means = [np.mean([r["rank_agreement"] for r in rows if r["value"] == value]) for value in values]
        axes.plot(np.array(values) / result["reference"][thing], means, "o-", label=thing)
    axes.set(xscale="log", xlabel="setting, as a multiple of the reference", ylabel="rank agreement, ReTrac")
    axes.legend(frameon=False)


if __name__ == "__main__":
    experiment("ablations", __doc__, run, draw, show)
