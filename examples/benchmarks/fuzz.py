"""Truncate and mutate a log a thousand times: each time it reads right or ends in a LogError.

    python examples/benchmarks/fuzz.py [--stores 1000] [--seed 0]

Saves the counts to examples/results/fuzz.json; stops at the first log that reads wrong, crashes or hangs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from machine import machine  # noqa: E402

from tests.log import fuzz  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stores", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "examples/results/fuzz.json")
    args = parser.parse_args()
    began = time.perf_counter()
    files = fuzz.original()
    expected = fuzz.contents(files)
    outcomes = Counter(
        fuzz.check(seed, files, expected) for seed in range(args.seed, args.seed + args.stores)
    )
    document = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "stores": args.stores,
        "read_right": outcomes["right"],
        "log_errors": outcomes["error"],
        "wrong_or_crashed": 0,  # it stops at the first
        "seconds": round(time.perf_counter() - began, 1),
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
