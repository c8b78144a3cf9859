"""What per-sample gradients cost, as ratios to one plain forward and backward in the same run.

    python examples/benchmarks/capture.py [--repeats 7] [--models small_unet dit …]

Prints the table and saves it to examples/results/capture.json, where other models keep their results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from models import CASES, LARGE, Case
from peers import Run, batch_1_loop, dattri_llm, opacus, vmap_grad

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine
from torch import Tensor

from diffhook.gradients import PerSampleGradients

RESULT = Path(__file__).parents[1] / "results" / "capture.json"


def plain(case: Case) -> Run:
    """Forward and backward, summed gradients: the unit of the table."""

    def run() -> None:
        case.model.zero_grad(set_to_none=True)
        case.losses().mean().backward()

    return run


def ours(dim: int, **options: bool) -> Callable[[Case], Run]:
    """diffhook: beside the training's own gradients (in step), or without them (probe)."""

    def make(case: Case) -> Run:
        engine = PerSampleGradients(case.model, projection_dim=dim, **options)

        def run() -> Tensor:
            case.model.zero_grad(set_to_none=True)
            with engine:
                case.losses().mean().backward()
            if dim:
                engine.projections  # noqa: B018
            return engine.norms

        return run

    return make


METHODS: dict[str, Callable[[Case], Run]] = {
    "plain forward + backward": plain,
    "batch-1 loop, norms": batch_1_loop,
    "vmap(grad), norms": vmap_grad,
    "opacus, norms": opacus,
    "dattri-llm, norms": dattri_llm,
    "diffhook probe, norms": ours(0, weight_gradients=False),
    "diffhook probe, norms + D = 2048": ours(2048, weight_gradients=False),
    "diffhook in step, norms": ours(0),
    "diffhook in step, norms + D = 2048": ours(2048),
    "diffhook in step, norms + D = 2048, products reused": ours(2048, reuse_products=True),
}


def exact_norms(case: Case) -> Tensor:
    """(B,) float64, one sample at a time."""
    original, autocast = case.model, case.autocast
    case.model, case.autocast = original.double(), None
    inputs, target = case.inputs, case.target
    case.inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    case.target = target.double()
    norms = batch_1_loop(case)()
    case.model, case.autocast = original.float(), autocast
    case.inputs, case.target = inputs, target
    assert norms is not None
    return norms


def peak_memory(model: str, method: str) -> int | None:
    """Bytes that two passes in a process of their own need above the model itself.

    The peak of a process that measured something else before would be that one's. The C library gives back
    at once what is freed, so that holes in its heap do not count. None where neither CUDA nor Linux tells, or
    the method cannot take the model.
    """
    command = [sys.executable, __file__, "--peak", model, method]
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=exact)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_peak(model: str, method: str) -> None:
    """What :func:`peak_memory` asks its process."""
    torch.manual_seed(0)
    case = (CASES | LARGE)[model]()
    run = METHODS[method](case)
    start = torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")
    for _ in range(2):
        run()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
    print(peak - start)


def _status(name: str) -> int:
    """A field of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure(model: str, case: Case, repeats: int, methods: Collection[str] = METHODS) -> list[dict[str, Any]]:
    """Rows of the table for one model; the methods take turns, so that noise hits all alike."""
    runs, notes = {}, {}
    exact = exact_norms(case)
    errors: dict[str, float] = {}
    for name, make in METHODS.items():
        if name not in methods:
            continue
        try:
            runs[name] = make(case)
            norms = runs[name]()
            if norms is not None:
                errors[name] = float(((norms.double() - exact).abs() / exact).max())
        except Exception as error:  # a peer that cannot take this model is noted, not measured
            runs.pop(name, None)
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    case.model.zero_grad(set_to_none=True)  # what is held here is not there for other processes
    memory = {name: peak_memory(model, name) for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    unit = statistics.median(seconds["plain forward + backward"])
    least = memory["plain forward + backward"]
    return [
        {
            "method": name,
            "ratio": round(statistics.median(seconds[name]) / unit, 3) if name in runs else None,
            "milliseconds": round(statistics.median(seconds[name]) * 1e3, 1) if name in runs else None,
            "peak_bytes": memory.get(name),
            "peak_ratio": round(peak / least, 2) if least and (peak := memory.get(name)) else None,
            "error": errors.get(name),
            "note": notes.get(name, ""),
        }
        for name in methods
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(*args.peak)
        return
    run(args.models, CASES, METHODS, args.repeats, args.out)


def run(
    models: Sequence[str],
    cases: Mapping[str, Callable[[], Case]],
    methods: Collection[str],
    repeats: int,
    path: Path,
) -> None:
    """Measure models one after the other; print and save each at once."""
    results = []
    for name in models:
        torch.manual_seed(0)
        case = cases[name]()
        title = f"{case.name} {float(f'{case.size / 1e6:.2g}'):g} M, batch {case.batch}"
        rows = measure(name, case, repeats, methods)
        made = {"date": date.today().isoformat(), "machine": machine(), "repeats": repeats}
        results.append({"model": name, "title": title, **made, "rows": rows})
        print(title)
        for row in rows:
            ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
            memory = "" if row["peak_ratio"] is None else f"× {row['peak_ratio']:.2f}"
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            print(f"  {row['method']:<36} {ratio:>6}  {memory:>10}  {error:>6}  {row['note']}", flush=True)
        save(results, path, cases)


def save(results: list[dict[str, Any]], path: Path, cases: Iterable[str] = CASES) -> None:
    """Write the results, in the order of the cases; those of models that were not measured stay."""
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    found = {result["model"]: result for result in [*kept, *results]}
    ordered = [found[name] for name in cases if name in found]
    path.write_text(json.dumps({"results": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
