"""Kill fifty processes that measure checkpoints, at random moments, and check every row they leave.

    python examples/benchmarks/checkpoint_kills.py [--kills 50] [--seed 0]

Saves the counts to examples/results/checkpoint_kills.json, and says what was lost, doubled or wrong.
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

from tests.checkpoints.kills import Harness  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "examples/results/checkpoint_kills.json")
    args = parser.parse_args()
    began = time.perf_counter()
    harness = Harness(args.seed)
    harness.kill(args.kills, lambda done: print(f"\r{done} kills", end="", flush=True))
    harness.close()
    document = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "kills": harness.kills,
        "logs": harness.runs,
        "kills_that_cut_a_sample": harness.cut_samples,
        "rows_checked": harness.rows_checked,
        "lost": harness.lost,
        "doubled": harness.doubled,
        "wrong": harness.wrong,
        "seconds": round(time.perf_counter() - began, 1),
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print("\r" + json.dumps(document, indent=1))
    sys.exit("\n".join(harness.problems) or 0)


if __name__ == "__main__":
    main()
