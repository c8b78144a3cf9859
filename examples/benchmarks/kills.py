"""Kill a hundred processes that train or compute queries, at random moments, and check every row they leave.

    python examples/benchmarks/kills.py [--kills 100] [--seed 0]

Saves the counts to examples/results/kills.json, and says what was corrupt, lost or doubled, if anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from machine import machine  # noqa: E402

from tests.log.kills import Harness  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "examples/results/kills.json")
    args = parser.parse_args()
    began = time.perf_counter()
    harness = Harness(args.seed)
    harness.kill(args.kills, lambda done: print(f"\r{done} kills", end="", flush=True))
    harness.close()
    document = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "kills": harness.kills,
        "of_processes_that_computed_queries": harness.killed_queries,
        "runs": harness.runs,
        "rows_checked": harness.rows_checked,
        "unfinished_files_met": harness.litter,
        "corrupt": harness.corrupt,
        "lost": harness.lost,
        "doubled": harness.doubled,
        "seconds": round(time.perf_counter() - began, 1),
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print("\r" + json.dumps(document, indent=1))
    sys.exit("\n".join(harness.problems) or 0)


if __name__ == "__main__":
    main()
