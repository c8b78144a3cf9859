"""What the defaults are worth: LDS and rank agreement against timesteps, noise, D, snapshots and stride.

    python examples/evidence/ablations.py [--quick]

The MLP of lds.py, and its retrained halves: where lds.py has trained them, they are taken from
runs/evidence/lds. One thing at a time is changed from a reference: a grid of 10 timesteps × 1 draw, D = 8192,
2 snapshots, every step captured. For TracIn, ReTrac and whitened ReTrac: the LDS over held-out queries, and
the Spearman correlation of all scores with those of the finest setting of that thing. Training is the same
to the bit whatever is captured, so all settings of a seed watch the same model.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from experiment import Result, experiment, key, single_threaded, told
from retraining import SETTINGS, Problem, ask, retrained
from scipy.stats import spearmanr
from training import LOSS, train

import diffhook
from diffhook.analysis import Scores
from diffhook.analysis.evaluation import lds

METHODS = ("tracin", "retrac", "whitened-retrac")
REFERENCE = {"timesteps": 10, "noise draws": 1, "D": 8192, "snapshots": 2, "stride": 1}
VALUES = {
    "timesteps": (2, 5, 10, 20, 40),
    "noise draws": (1, 2, 4),
    "D": (512, 2048, 8192, 16384),
    "snapshots": (1, 2, 4, 8),
    "stride": (1, 2, 4, 8, 16),
}
QUICK = {"timesteps": (2, 3), "noise draws": (1, 2), "D": (64, 128), "snapshots": (1, 2), "stride": (1, 2)}


Found = dict[tuple[str, int], dict[str, npt.NDArray[Any]]]  # (thing, value) → method → (Q, N)


def run(args: argparse.Namespace) -> Result:
    shared = args.out if args.quick else args.out.parent / "lds" / "MLP"
    shared.mkdir(parents=True, exist_ok=True)
    problem = Problem.make(SETTINGS["MLP"], shared, args.quick)
    models = retrained(problem, args, shared)
    measured = -models.losses[:, :, : len(problem.queries["held out"])]
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        study = functools.partial(watch, problem, args.out, QUICK if args.quick else VALUES)
        by_seed = list(pool.map(study, args.seeds))
    rows = []
    for seed, found in zip(args.seeds, by_seed, strict=True):
        for (thing, value), scores in found.items():
            values = [v for t, v in found if t == thing]
            finest = found[thing, values[0] if thing == "stride" else values[-1]]
            for method in METHODS:
                score = lds(scores[method], models.subsets, measured)
                pairs = zip(scores[method], finest[method], strict=True)
                rank = float(np.mean([spearmanr(one, other)[0] for one, other in pairs]))
                rows.append({
                    "seed": seed, "thing": thing, "value": value, "method": method, "mean": score.mean.mean,
                    "error": score.mean.error, "rank_agreement": rank,
                })  # fmt: skip
    return {"training_samples": len(problem.training), "reference": REFERENCE, "rows": rows}


def watch(problem: Problem, out: Path, settings: dict[str, tuple[int, ...]], seed: int) -> Found:
    """One seed's scores under all settings."""
    single_threaded()
    reference = {thing: value if value in settings[thing] else settings[thing][0]
                 for thing, value in REFERENCE.items()}  # fmt: skip
    found: Found = {}
    known: dict[tuple[str, ...], dict[str, npt.NDArray[Any]]] = {}
    for thing, values in settings.items():
        for value in values:
            setting = {**reference, thing: value}
            source = "train" if thing == "stride" else "probe"
            name = (source, *map(str, setting.values()))
            if name not in known:
                known[name] = scored(problem, seed, out / f"seed-{seed}" / "-".join(name), setting, source)
            found[thing, value] = known[name]
    return found


def scored(
    problem: Problem, seed: int, path: Path, setting: dict[str, int], source: str
) -> dict[str, npt.NDArray[Any]]:
    """Method → (Q, N): of the training's events, or of probes on the grid."""
    problem = replace(
        problem,
        grid=diffhook.Grid(setting["timesteps"], draws=setting["noise draws"]),
        setting=replace(problem.setting, recipe=replace(problem.recipe, snapshots=setting["snapshots"])),
    )
    options: dict[str, Any] = {"every": setting["stride"] if source == "train" else 10**9}
    if source == "probe":
        options["objective"] = LOSS
        options["probe"] = diffhook.Probe(samples=None, grid=problem.grid, batch_size=64, label_timesteps=0)
    train(
        problem.training, problem.recipe, seed=seed, log=path, projection_dim=setting["D"], progress=False,
        **options,
    )  # fmt: skip
    log = diffhook.open_log(path)
    ask(log, problem.queries["held out"], "held out", problem, against=source)
    asked = key("held out", source)
    scores = {method: diffhook.influence(log, asked, method, source) for method in METHODS}
    return {method: of_all(each, len(problem.training)) for method, each in scores.items()}


def of_all(scores: Scores, samples: int) -> npt.NDArray[Any]:
    """(Q, N): 0 for samples that no captured step saw."""
    found = np.zeros((len(scores.query_ids), samples))
    found[:, scores.sample_ids] = scores.values
    return found


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
    for thing in VALUES:
        rows = [r for r in result["rows"] if r["thing"] == thing and r["method"] == METHODS[-1]]
        values = sorted({row["value"] for row in rows})
        means = [np.mean([r["mean"] for r in rows if r["value"] == value]) for value in values]
        axes.plot(np.array(values) / result["reference"][thing], means, "o-", label=thing)
    axes.set(xscale="log", xlabel="setting, as a multiple of the reference", ylabel="LDS, whitened ReTrac")
    axes.legend(frameon=False)


if __name__ == "__main__":
    experiment("ablations", __doc__, run, draw, show)
