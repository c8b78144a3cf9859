"""Two thousand random histories of a log: train, checkpoint, crash, resume, copy, query, compact, repair.

    python examples/benchmarks/histories.py [--histories 2000] [--seed 0]

After each event the readable rows are compared with a model's. Saves the counts to
examples/results/histories.json, and says which histories went wrong, if any.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from machine import machine  # noqa: E402

from tests.log.histories import LENGTH, check  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--histories", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "examples/results/histories.json")
    args = parser.parse_args()
    logging.getLogger("diffhook").setLevel(logging.ERROR)
    began = time.perf_counter()
    seeds = range(args.seed, args.seed + args.histories)
    rows, problems = check(seeds, lambda done: print(f"\r{done} histories", end="", flush=True))
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
    print("\r" + json.dumps(document, indent=1))
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
