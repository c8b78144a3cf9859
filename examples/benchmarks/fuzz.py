"""Truncate and mutate a log a thousand times: each time it reads right or ends in a LogError.

    python examples/benchmarks/fuzz.py [--stores 1000] [--folders 1000] [--seed 0]

Folders are prepared on a disk, with links, pipes, devices, bombs of names and escape sequences, and commands
are run on them.

Saves the counts to examples/results/fuzz.json, and says which logs read wrong, crashed or hung, if any.
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

from tests.log import fuzz, hostile_folders  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stores", type=int, default=1000)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "examples/results/fuzz.json")
    args = parser.parse_args()
    began = time.perf_counter()
    files = fuzz.original()
    expected = fuzz.contents(files)
    found = []
    for seed in range(args.seed, args.seed + args.stores):
        found.append(fuzz.check(seed, files, expected))
    for seed in range(args.seed, args.seed + args.folders):
        found.append(hostile_folders.check(seed, files))
        if found[-1].kind not in ("right", "error"):
            print(found[-1].words, flush=True)
        if (seed + 1) % 50 == 0:
            print(f"{seed + 1} folders", flush=True)
    outcomes = Counter(outcome.kind for outcome in found)
    document = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "stores": args.stores,
        "folders": args.folders,
        "read_right": outcomes["right"],
        "log_errors": outcomes["error"],
        "wrong": outcomes["wrong"],
        "crashed": outcomes["crashed"],
        "hung": outcomes["hung"],
        "seconds": round(time.perf_counter() - began, 1),
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    sys.exit("\n".join(o.words for o in found if o.kind not in ("right", "error")) or 0)


if __name__ == "__main__":
    main()
