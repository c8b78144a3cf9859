"""Linear datamodeling scores: do scores predict what retrained models do?

    python examples/evidence/lds.py [--quick] [--settings MLP UNet emoji]

scikit-learn's 8 × 8 digits, class-conditional, in two settings: a small UNet, and an MLP in its place, which
is trained so fast that thousands of steps are affordable; and emoji at 16 × 16 with a UNet that knows no
classes, whose held-out queries are the sixth of a family of six that differ in skin tone alone. Models are
trained on random halves of 256 pictures, twice each, and the loss of 40 held-out and 40 generated ones is
measured under each of them. The trainings of the MLP and on emoji pair their randomness: a sample's timesteps
and noise are of the seed, the sample and the epoch, whatever else is trained on; the UNet's on digits draw as
loops do. A score's LDS is the Spearman correlation over halves between the negative of those losses and the
sum of the scores of a half's samples, averaged over queries; the ceiling is what the losses of one seed reach
as a score for those of the other. Watched trainings on all samples give the scores, from probes and from the
training's own rows: of each sample 25 a snapshot of the MLP's training, ten of the UNet's on digits, and
seven or eight of that on emoji. From the same snapshots, timesteps and noise come influence by the projected
Gauss–Newton matrix and, where kronfluence is installed, by EK-FAC. The default method is also given smaller
projections of the same trainings. Errors are of the bootstrap over queries and halves, and of the spread
between watched trainings. How far the default method leads another is resampled with the same queries and
halves for both. TracIn and ReTrac of a few samples are computed by dattri too, from the same snapshots, noise
and timestep. What a run left in --out is taken up: trained halves and finished logs. Results of a setting
that is not asked for stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ekfac import ekfac_scores
from experiment import Result, earlier, experiment, key, made_here, single_threaded, told
from gauss_newton import gauss_newton_scores
from outside import against_dattri
from retraining import ADAM, OUTPUTS, SEEDS, SETTINGS, Problem, ask, retrained, watched

import diffhook
from diffhook.analysis import Method
from diffhook.analysis.evaluation import lds, lds_lead
from diffhook.analysis.methods import WhitenedReTrac

Scores = npt.NDArray[np.floating[Any]]


class OneSide(WhitenedReTrac):
    """Whitened on one side alone, as influence functions are, with λ = 0.03 · tr(G)/D."""

    default_ridge = 0.03

    def transform_queries(self, directions: Any, samples: Any) -> Any:
        return self.whitened_once(directions, samples)


# what it is called here, the method, and where the training's rows come from
METHODS: tuple[tuple[str, str | Method, str], ...] = (
    ("whitened ReTrac, grid", "whitened-retrac", "probe"),
    ("whitened ReTrac, events", "whitened-retrac", "train"),
    ("whitened ReTrac, on one side, grid", OneSide(), "probe"),
    ("whitened ReTrac, on one side, events", OneSide(), "train"),
    ("whitened ReTrac, three times λ, grid", WhitenedReTrac(0.3), "probe"),
    ("whitened ReTrac, three times λ, events", WhitenedReTrac(0.3), "train"),
    ("whitened ReTrac, a third of λ, grid", WhitenedReTrac(0.03), "probe"),
    ("whitened ReTrac, a third of λ, events", WhitenedReTrac(0.03), "train"),
    ("TRAK, grid", "trak", "probe"),
    ("TRAK, events", "trak", "train"),
    ("TracIn, grid", "tracin", "probe"),
    ("TracIn, events", "tracin", "train"),
    ("ReTrac, grid", "retrac", "probe"),
    ("ReTrac, events", "retrac", "train"),
    ("cosine, grid", "cosine", "probe"),
    ("cosine, events", "cosine", "train"),
    ("Adam TracIn, grid", "adam-tracin", "probe"),
    ("Adam TracIn, events", "adam-tracin", "train"),
    ("Adam ReTrac, grid", "adam-retrac", "probe"),
    ("Adam ReTrac, events", "adam-retrac", "train"),
    ("D-TRAK", "d-trak", "squared-output"),
    ("DAS", "das", "mean-output"),
)
DEFAULT = METHODS[0][0]
QUICK = [row for row in METHODS if row[0] in (DEFAULT, "Adam TracIn, grid", "D-TRAK")]
PARTS = ("rows", "ceilings", "settings")  # of a result, each by setting


def all_scores(
    problem: Problem, seed: int, path: Path, methods: Sequence[tuple[str, str | Method, str]] = METHODS
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
            what = source if source in OUTPUTS else ADAM if title.startswith("Adam") else ""
            output = source in OUTPUTS
            origin = key("training", source, "probe") if output else source
            asked = key(name, what, "probe" if output else source)
            found[name][title] = diffhook.influence(log, asked, method, origin).values
        flat, own = (s.images.reshape(len(s), -1) for s in (queries, problem.training))
        found[name]["pixels"] = -((flat[:, None] - own[None]) ** 2).sum(2)
        for title, known in (("same label", "labels"), ("siblings", "sources")):
            ours, theirs = (getattr(samples, known) for samples in (queries, problem.training))
            if ours is not None:
                found[name][title] = np.equal(ours[:, None], theirs).astype(float)
        found[name]["random"] = rng.standard_normal((len(flat), len(own)))
    return found


def narrow_scores(problem: Problem, seed: int, path: Path) -> dict[str, dict[str, Scores]]:
    """Query set → method → (Q, N), of the default method, from a training watched by smaller projections."""
    dim = problem.setting.narrow
    recipe = replace(problem.recipe, dim=dim)
    log = watched(replace(problem, setting=replace(problem.setting, recipe=recipe)), seed, path)
    return {
        name: {
            f"{title}, D = {dim}": diffhook.influence(log, key(name, source), method, source).values
            for title, method, source in METHODS[:2]
        }
        for name in problem.queries
    }


def curvature_scores(problem: Problem, path: Path) -> dict[str, dict[str, Scores]]:
    """Query set → method → (Q, N), of the methods that know the model's curvature, from a watched log."""
    log = diffhook.open_log(path)
    titles = {"Gauss–Newton, projected": False, "Gauss–Newton, projected, unit": True}
    found: dict[str, dict[str, Scores]] = {
        name: {
            title: gauss_newton_scores(problem, log, key(name, "probe"), unit=unit)
            for title, unit in titles.items()
        }
        for name in problem.queries
    }
    if (ekfac := ekfac_scores(problem, log, path.with_suffix(".ekfac"))) is not None:
        parts = np.split(ekfac, np.cumsum([len(queries) for queries in problem.queries.values()])[:-1])
        for name, scores in zip(problem.queries, parts, strict=True):
            found[name]["EK-FAC, by kronfluence"] = scores
    return found


def scores_of_seed(
    problem: Problem, path: Path, seed: int, methods: Sequence[tuple[str, str | Method, str]]
) -> dict[str, dict[str, Scores]]:
    """Query set → method → (Q, N): all of the table."""
    found, curved = all_scores(problem, seed, path, methods), curvature_scores(problem, path)
    smaller = narrow_scores(problem, seed, path.with_name(f"narrow-{seed}"))
    return {name: {**scores, **smaller[name], **curved[name]} for name, scores in found.items()}


def scores_by_seed(
    problem: Problem, args: argparse.Namespace, out: Path, methods: Sequence[tuple[str, str | Method, str]]
) -> list[dict[str, dict[str, Scores]]]:
    """Of every watched training, so many at a time as halves are trained."""
    jobs = [(problem, out / f"log-{seed}", seed, methods) for seed in args.seeds]
    if args.processes == 1:
        return [scores_of_seed(*job) for job in jobs]
    with ProcessPoolExecutor(args.processes, get_context("spawn"), single_threaded) as pool:
        return list(pool.map(scores_of_seed, *zip(*jobs, strict=True)))


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="some of them"
    )


def run(args: argparse.Namespace) -> Result:
    if len(args.seeds) < 2:
        raise SystemExit(f"--seeds names {len(args.seeds)}; expected 2 or more, to see how far they differ")
    result = kept(args)
    rows, ceilings, settings = (result[part] for part in PARTS)
    for case in args.settings:
        out = args.out / key(case)
        problem = Problem.make(SETTINGS[case], out, args.quick)
        models = retrained(problem, args, out)
        start = 0
        methods = QUICK if args.quick else METHODS
        by_seed = scores_by_seed(problem, args, out, methods)
        for name, queries in problem.queries.items():
            losses_of = -models.losses[:, :, start : start + len(queries)]
            start += len(queries)
            group = {"case": case, "queries": name}
            for method in by_seed[0][name]:
                found = judged([of_seed[name] for of_seed in by_seed], method, models.subsets, losses_of)
                rows.append({**group, "method": method, **found})
            ceiling = lds(by_seed[0][name][DEFAULT], models.subsets, losses_of).ceiling
            assert ceiling is not None
            ceilings.append({**group, **ceiling._asdict()})
        settings.append({
            "case": case, "halves": len(models.subsets), "epochs": problem.recipe.epochs,
            "watched": len(args.seeds), **made_here(),
        })  # fmt: skip
    for part in PARTS:
        result[part].sort(key=lambda each: list(SETTINGS).index(each["case"]))
    return {
        "training_samples": len(problem.training), "asked": len(queries), "retrained_seeds": len(SEEDS),
        **result, "outside": against_dattri(problem, out / "outside"),
    }  # fmt: skip


def kept(args: argparse.Namespace) -> dict[str, list[Result]]:
    """The parts of an earlier result that are of settings that are not measured now."""
    found = earlier("lds", args)
    return {
        part: [each for each in found.get(part, ()) if each["case"] not in args.settings] for part in PARTS
    }


def judged(
    scores: Sequence[dict[str, Scores]], method: str, subsets: Sequence[Any], measured: Scores
) -> Result:
    """The LDS of one method, and how far the default leads it, over all watched trainings.

    Args:
        scores: by watched training, method → (Q, N).
        measured: (seeds, M, Q) of the retrained models.
    """
    each = [lds(one[method], subsets, measured.mean(0)).mean for one in scores]
    leads = [lds_lead(one[DEFAULT], one[method], subsets, measured) for one in scores]
    return {**pooled(each), "behind": pooled(leads)}


def pooled(each: Sequence[Any]) -> Result:
    """The mean over watched trainings; its error that of queries and halves, and of so many trainings."""
    means = [one.mean for one in each]
    sampled, spread = np.mean([one.error for one in each]), np.std(means, ddof=1) / len(each) ** 0.5
    return {"mean": float(np.mean(means)), "error": float(np.hypot(sampled, spread)), "each": means}


def show(result: Result) -> list[str]:
    lines = [f"{'case':<6}{'queries':<11}{'method':<25}{'LDS':>16}   behind {DEFAULT} by"]
    for row in result["rows"]:
        lines.append(
            f"{row['case']:<6}{row['queries']:<11}{row['method']:<25}{told(row, 3):>16}"
            f"   {told(row['behind'], 3)}"
        )
    for row in result["ceilings"]:
        lines.append(f"{row['case']:<6}{row['queries']:<11}{'ceiling':<25}{told(row, 3):>16}")
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
    width = 0.8 / len(groups)
    for offset, group in enumerate(groups):
        rows = [row for row in result["rows"] if (row["case"], row["queries"]) == group]
        place = (
            np.array([methods.index(row["method"]) for row in rows])
            + (offset - (len(groups) - 1) / 2) * width
        )
        errors = [row["error"] for row in rows]
        axes.bar(place, [row["mean"] for row in rows], 0.95 * width, yerr=errors, label=", ".join(group))
    axes.axhline(0, color="k", lw=0.6)
    axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
    axes.set_ylabel("LDS")
    axes.legend(frameon=False, fontsize=8, ncols=len(groups), loc="lower center", bbox_to_anchor=(0.5, 1))


if __name__ == "__main__":
    experiment("lds", __doc__, run, draw, show, seeds=(0, 1, 2), more=more)
