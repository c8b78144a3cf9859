"""Two thousand random histories of a log: train, checkpoint, crash, resume, copy, query, compact, repair.

    python examples/benchmarks/histories.py [--histories 2000] [--seed 0]

After each event the readable rows are compared with a model's. A process lives through fifty histories, and
the next fifty get a new one: one that dies is counted as a problem, and the others go on. Saves the counts to
examples/results/histories.json, and says which histories went wrong, if any.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from machine import machine  # noqa: E402

from tests.log.histories import LENGTH, check  # noqa: E402

OF_ONE_PROCESS = 50


def live(seeds: range) -> tuple[int, list[str]]:
    """The rows compared and the problems of these histories, in a process of their own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _quiet) as process:
        try:
            return process.submit(check, seeds).result()
        except BrokenProcessPool:
            return 0, [f"seeds {seeds.start} to {seeds.stop - 1}: their process died"]


def _quiet() -> None:
    logging.getLogger("diffhook").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--histories", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "examples/results/histories.json")
    args = parser.parse_args()
    began = time.perf_counter()
    rows, problems = 0, []
    for first in range(0, args.histories, OF_ONE_PROCESS):
        seeds = range(args.seed + first, args.seed + min(first + OF_ONE_PROCESS, args.histories))
        compared, wrong = live(seeds)
        rows, problems = rows + compared, problems + wrong
        print(f"{first + len(seeds)} histories, {rows:,} rows, {len(problems)} problems", flush=True)
    document = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "histories": args.histories,
        "events_of_each": LENGTH,
        "rows_compared": rows,
        "problems": len(problems),
        "seconds": round(time.perf_counter() - began, 1),
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
