"""Linear datamodeling scores on MNIST: do scores predict what retrained models do?

    python examples/evidence/lds.py [--quick]

A small UNet, once with class labels and once without. Models are trained on 32 random halves of 500 digits,
each with three seeds; the loss of 32 held-out and 32 generated queries, over 50 timesteps, is measured under
each. A score's LDS is the Spearman correlation over halves between the negative of those losses and the sum
of the scores of a half's samples, averaged over queries; the ceiling is what the losses of one seed reach
as a score for those of the others. Three watched trainings give the scores. Errors are of the bootstrap
over queries and halves, and of the spread between watched trainings. Every other seed and the seeds
between are also set against each other, trained, watched and scored apart, to see whether they agree.
TracIn and ReTrac of a few samples are computed by dattri too, from the same snapshots, noise and timestep.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from experiment import Result, agreeing, experiment, single_threaded, told
from outside import against_dattri
from sources import Samples, small_digits, split
from training import LOSS, Recipe, generate, losses, train

import diffhook
from diffhook.analysis.evaluation import Retrained, half_subsets, lds, retrain

Scores = npt.NDArray[np.floating[Any]]
# what it is called here, the method, and where the training's rows come from
METHODS = (
    ("TracIn, events", "tracin", "train"),
    ("ReTrac, events", "retrac", "train"),
    ("TracIn, grid", "tracin", "probe"),
    ("ReTrac, grid", "retrac", "probe"),
    ("whitened ReTrac, events", "whitened-retrac", "train"),
    ("whitened ReTrac, grid", "whitened-retrac", "probe"),
    ("cosine, events", "cosine", "train"),
    ("cosine, grid", "cosine", "probe"),
    ("TRAK, events", "trak", "train"),
    ("TRAK, grid", "trak", "probe"),
    ("Adam TracIn, events", "adam-tracin", "train"),
    ("Adam ReTrac, events", "adam-retrac", "train"),
    ("Adam TracIn, grid", "adam-tracin", "probe"),
    ("Adam ReTrac, grid", "adam-retrac", "probe"),
    ("D-TRAK", "d-trak", "squared-output"),
    ("DAS", "das", "mean-output"),
)
OUTPUTS = {"squared-output", "mean-output"}  # what D-TRAK and DAS differentiate
ADAM = "adam"


@dataclass(frozen=True)
class Problem:
    """Training samples, queries, and how models are trained; the same for every script that retrains."""

    training: Samples
    queries: dict[str, Samples]
    recipe: Recipe
    grid: diffhook.Grid

    @classmethod
    def make(cls, conditional: bool, out: Path, quick: bool, samples: int = 500, asked: int = 32) -> Problem:
        samples, asked = (60, 4) if quick else (samples, asked)
        training, held_out = split(small_digits(conditional), samples, asked, seed=0)
        recipe = Recipe(epochs=2 if quick else 20_000 // samples, snapshots=2 if quick else 3)
        made = generated(training, recipe, out / "generated.npz", asked, steps=5 if quick else 50)
        queries = {"held out": held_out, "generated": made}
        return cls(training, queries, recipe, diffhook.Grid(3 if quick else 10))

    @property
    def asked(self) -> Samples:
        """All queries, one after the other."""
        parts = list(self.queries.values())
        labels = np.concatenate([part.labels for part in parts]) if self.training.classes else None
        return Samples(np.concatenate([part.images for part in parts]), labels, self.training.classes)


def generated(training: Samples, recipe: Recipe, path: Path, count: int, steps: int) -> Samples:
    """What a model of its own makes, kept for the next run."""
    if not path.exists():
        made = generate(train(training, recipe, seed=100), training, count, steps=steps)
        labels = {} if made.labels is None else {"labels": made.labels}
        np.savez(path, images=made.images, **labels)
    with np.load(path) as file:
        return Samples(file["images"], file.get("labels"), training.classes)


def train_on(problem: Problem, ids: npt.NDArray[np.int64]) -> torch.nn.Module:
    """A model trained on a subset; retrain() has seeded torch."""
    single_threaded()
    return train(problem.training, problem.recipe, seed=torch.initial_seed(), ids=ids, progress=False)


def measured(problem: Problem, model: Any) -> npt.NDArray[np.float64]:
    """(Q,) losses of all queries."""
    return losses(model, problem.asked, timesteps=10 if problem.grid.count < 10 else 50)


def retrained(problem: Problem, args: argparse.Namespace, out: Path) -> Retrained:
    """The models on halves; those that the record in ``out`` has are not trained again."""
    return retrain(
        functools.partial(train_on, problem),
        functools.partial(measured, problem),
        half_subsets(len(problem.training), 4 if args.quick else 32),
        seeds=args.seeds,
        record=out / "halves.jsonl",
        processes=args.processes,
    )


def watched(problem: Problem, seed: int, path: Path) -> diffhook.RunLog:
    """The log of a training on all samples, probes on the grid, and the queries' gradients in it."""
    probe = diffhook.Probe(samples=None, grid=problem.grid, batch_size=64)
    train(
        problem.training, problem.recipe, seed=seed, log=path, objective=LOSS, probe=probe,
        keep_preconditioner=True, projection_dim=4096,
    )  # fmt: skip
    log = diffhook.open_log(path)
    for name, queries in problem.queries.items():
        ask(log, queries, name, problem)
        ask(log, queries, name, problem, ADAM)
    return log


def ask(log: diffhook.RunLog, samples: Samples, name: str, problem: Problem, what: str = "") -> None:
    """Gradients at the snapshots: of the loss, of the loss as Adam divides it, or of another measurement."""
    diffhook.query(
        log, samples.batch(), key(name, what), diffhook.Measured(LOSS, what) if what in OUTPUTS else LOSS,
        grid=problem.grid, preconditioned=what == ADAM, batch_size=64, overwrite=True,
    )  # fmt: skip


def key(*words: str) -> str:
    return "-".join("-".join(word.split()) for word in words if word)


def all_scores(
    problem: Problem, seed: int, path: Path, methods: Sequence[tuple[str, str, str]] = METHODS
) -> dict[str, dict[str, Scores]]:
    """Query set → method → (Q, N)."""
    log = watched(problem, seed, path)
    for what in sorted({source for _, _, source in methods} & OUTPUTS):
        for name, samples in {"training": problem.training, **problem.queries}.items():
            ask(log, samples, name, problem, what)
    found: dict[str, dict[str, Scores]] = {}
    rng = np.random.default_rng(seed)
    for name, queries in problem.queries.items():
        found[name] = {}
        for title, method, source in methods:
            what = source if source in OUTPUTS else ADAM if method.startswith(ADAM) else ""
            origin = key("training", source) if source in OUTPUTS else source
            found[name][title] = diffhook.influence(log, key(name, what), method, origin).values
        flat, own = (s.images.reshape(len(s), -1) for s in (queries, problem.training))
        found[name]["pixels"] = -((flat[:, None] - own[None]) ** 2).sum(2)
        found[name]["random"] = rng.standard_normal((len(flat), len(own)))
    return found


def run(args: argparse.Namespace) -> Result:
    if len(args.seeds) < 2:
        raise SystemExit(f"--seeds names {len(args.seeds)}; expected 2 or more, to see whether they agree")
    rows, ceilings = [], []
    for conditional in (False, True):
        case = "with labels" if conditional else "without labels"
        out = args.out / key(case)
        out.mkdir(parents=True, exist_ok=True)
        problem = Problem.make(conditional, out, args.quick)
        models = retrained(problem, args, out)
        start = 0
        by_seed = [all_scores(problem, seed, out / f"log-{seed}") for seed in args.seeds]
        for name, queries in problem.queries.items():
            losses_of = -models.losses[:, :, start : start + len(queries)]
            start += len(queries)
            for method in by_seed[0][name]:
                scores = [of_seed[name][method] for of_seed in by_seed]
                found = judged(scores, models.subsets, losses_of)
                rows.append({"case": case, "queries": name, "method": method, **found})
            ceiling = lds(scores[0], models.subsets, losses_of).ceiling
            assert ceiling is not None
            ceilings.append({"case": case, "queries": name, "mean": ceiling.mean, "error": ceiling.error})
    return {
        "training_samples": len(problem.training), "asked": len(queries), "halves": len(models.subsets),
        "retrainings": models.losses.shape[0] * models.losses.shape[1] * 2, "epochs": problem.recipe.epochs,
        "rows": rows, "ceilings": ceilings, "outside": against_dattri(problem, args.out / "outside"),
    }  # fmt: skip


def judged(scores: Sequence[Scores], subsets: Sequence[Any], measured: Scores) -> Result:
    """The LDS of all watched seeds and of two halves of them, each with retrainings of its own.

    Args:
        scores: (Q, N) by seed.
        measured: (seeds, M, Q) of the retrained models.
    """
    spread = np.std([lds(one, subsets, measured).mean.mean for one in scores], ddof=1)
    halves = [pooled(scores[start::2], subsets, measured[start::2], spread) for start in (0, 1)]
    return {**pooled(scores, subsets, measured, spread), "halves": halves, "seeds_agree": agreeing(halves)}


def pooled(scores: Sequence[Scores], subsets: Sequence[Any], measured: Scores, spread: float) -> Result:
    """The mean over watched seeds; its error that of queries and halves, and of so many seeds."""
    each = [lds(one, subsets, measured).mean for one in scores]
    sampled = np.mean([one.error for one in each])
    error = float(np.hypot(sampled, spread / len(scores) ** 0.5))
    return {"mean": float(np.mean([one.mean for one in each])), "error": error}


def show(result: Result) -> list[str]:
    lines = [f"{'case':<16}{'queries':<11}{'method':<25}{'LDS':>16}   seeds agree"]
    for row in result["rows"]:
        lines.append(
            f"{row['case']:<16}{row['queries']:<11}{row['method']:<25}{told(row, 3):>16}"
            f"   {row['seeds_agree']}"
        )
    for row in result["ceilings"]:
        lines.append(f"{row['case']:<16}{row['queries']:<11}{'ceiling':<25}{told(row, 3):>16}")
    check = result["outside"]
    if "note" in check:
        lines.append(check["note"])
    else:
        lines.append(
            f"dattri on {check['pairs']} pairs: TracIn differs by {check['tracin']:.0e}, ReTrac by "
            f"{check['retrac']:.0e} of the largest score"
        )
    return lines


def draw(axes: Any, result: Result) -> None:
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    groups = list(dict.fromkeys((row["case"], row["queries"]) for row in result["rows"]))
    for offset, group in enumerate(groups):
        rows = [row for row in result["rows"] if (row["case"], row["queries"]) == group]
        place = np.arange(len(methods)) + (offset - 1.5) * 0.2
        errors = [row["error"] for row in rows]
        axes.bar(place, [row["mean"] for row in rows], 0.19, yerr=errors, label=", ".join(group))
    axes.axhline(0, color="k", lw=0.6)
    axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
    axes.set_ylabel("LDS")
    axes.legend(frameon=False, fontsize=8, ncols=len(groups), loc="lower center", bbox_to_anchor=(0.5, 1))


if __name__ == "__main__":
    experiment("lds", __doc__, run, draw, show, seeds=(0, 1, 2))
