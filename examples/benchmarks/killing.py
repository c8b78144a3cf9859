"""Killing processes at random moments: what both benchmarks of it share."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # for the harnesses in tests/, and for machine.py

from machine import machine  # noqa: E402


def benchmark(
    doc: str | None,
    name: str,
    kills: int,
    harness: Callable[[int], Any],
    counts: Callable[[Any], dict[str, Any]],
) -> None:
    """Kill, check, and save the counts to examples/results/NAME.json; exits with what was wrong, if anything.

    Args:
        kills: so many, unless --kills says otherwise.
        harness: seed → what kills and checks.
        counts: what of it to keep.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / f"examples/results/{name}.json")
    args = parser.parse_args()
    began = time.perf_counter()
    found = harness(args.seed)
    found.kill(args.kills, lambda done: print(f"\r{done} kills", end="", flush=True))
    found.close()
    document = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "kills": found.kills,
        **counts(found),
        "seconds": round(time.perf_counter() - began, 1),
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print("\r" + json.dumps(document, indent=1))
    sys.exit("\n".join(found.problems) or 0)
