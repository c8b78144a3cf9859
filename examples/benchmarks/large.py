"""What capture costs where models are wide: one block of a DiT, and the whole UNet of Stable Diffusion 1.5.

    python examples/benchmarks/large.py [--repeats 5] [--models dit_block_384 …]

As capture.py, with the methods that such models leave room for; the UNet takes 20 GB of memory. Prints the
table and saves it to examples/results/large.json, where other models keep their results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from capture import METHODS, RESULT, run
from models import LARGE

SHOWN = [name for name in METHODS if name.startswith(("plain", "batch-1", "diffhook"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="*", choices=LARGE, default=list(LARGE))
    parser.add_argument("--out", type=Path, default=RESULT.with_name("large.json"))
    args = parser.parse_args()
    run(args.models, LARGE, SHOWN, args.repeats, args.out)


if __name__ == "__main__":
    main()
