"""Train four hundred steps into an object store that refuses, delays or cuts off two hundred requests.

    python examples/benchmarks/s3.py [--steps 400] [--faults 200] [--seed 0]

Saves the counts and the longest stalls to examples/results/s3.json, and says what was lost, if anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from machine import machine  # noqa: E402

from tests.log.s3_faults import check, faulty_s3  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "examples/results/s3.json")
    args = parser.parse_args()
    with faulty_s3(args.seed) as app:
        counts, problems = check(app, args.steps, args.faults)
    document = {"date": date.today().isoformat(), "machine": machine(), "seed": args.seed, **counts}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
