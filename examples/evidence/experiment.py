"""What all experiments share: their options, their results on disk, and a mean over seeds."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine

RESULTS = Path(__file__).parents[1] / "results"
Result = dict[str, Any]


def experiment(
    name: str,
    doc: str,
    run: Callable[[argparse.Namespace], Result],
    draw: Callable[[Any, Result], None],
    show: Callable[[Result], list[str]],
    *,
    seeds: Sequence[int] = (0, 1),
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    other: Callable[[argparse.Namespace], bool] = lambda args: False,
) -> None:
    """Run an experiment as its options say; print its table; save it, and its figure.

    The full form goes to examples/results/NAME.json and NAME.svg, the quick one and others to --out only.

    Args:
        run: options → the result, as JSON. Beside --quick, --out and --seeds, those that ``more`` adds.
        draw: (matplotlib axes, result) → the figure.
        show: result → lines of the table.
        other: options → whether they ask for something else than the documents' table.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; says nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence") / name, help="logs and models")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="of the watched trainings")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, where many are needed")
    more(parser)
    args = parser.parse_args()
    args.processes = 1 if args.quick else args.processes
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    result = run(args)
    result |= {
        **made_here(),
        "seeds": args.seeds,
        "quick": args.quick,
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    print("\n".join(show(result)))
    folder = args.out if args.quick or other(args) else RESULTS
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    figure(draw, result, folder / f"{name}.svg")
    print(f"{folder / name}.json, {folder / name}.svg; {result['minutes']} minutes")


def earlier(name: str, args: argparse.Namespace) -> Result:
    """An experiment's last full result, of which parts may stay; empty where there is none, or is to be."""
    path = RESULTS / f"{name}.json"
    found: Result = json.loads(path.read_text()) if path.exists() and not args.quick else {}
    return found


def made_here() -> Result:
    """When and where a result comes from."""
    return {"date": date.today().isoformat(), "machine": machine()}


def figure(draw: Callable[[Any, Result], None], result: Result, path: Path) -> None:
    """Save what ``draw`` puts on matplotlib axes, the same bytes for the same result."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.hashsalt": "diffhook", "svg.fonttype": "none", "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        canvas = Figure(figsize=(7.2, 3.2), layout="constrained")
        draw(canvas.subplots(), result)
        canvas.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


def over_seeds(values: Sequence[float]) -> Result:
    """Mean, its standard error, and the values themselves."""
    each = [float(value) for value in values]
    error = float(np.std(each, ddof=1) / len(each) ** 0.5) if len(each) > 1 else float("nan")
    return {"mean": float(np.mean(each)), "error": error, "each": each}


def agreeing(found: Sequence[Result]) -> bool:
    """Whether two estimates (``mean``, ``error``) lie within two standard errors of their difference."""
    first, second = found[:2]
    return abs(first["mean"] - second["mean"]) <= 2 * float(np.hypot(first["error"], second["error"]))


def told(value: Result, digits: int = 2) -> str:
    """0.12 ± 0.03."""
    return f"{value['mean']:.{digits}f} ± {value['error']:.{digits}f}"


def single_threaded() -> None:
    """For trainings beside each other: one core each."""
    torch.set_num_threads(1)


def key(*words: str) -> str:
    """A name for a folder or a query set."""
    return "-".join("-".join(word.split()) for word in words if word)
