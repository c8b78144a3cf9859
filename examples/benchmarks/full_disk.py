"""How long a full disk holds up a training of ten steps with a checkpoint: at a step, there, and at its end.

    python examples/benchmarks/full_disk.py

The disk is full from the opening on, or from the fourth step on, and stays so. What may be waited for, once
each: 5 s at the opening, 1 s for room in memory, 2 s at a checkpoint and 5 s at the end. Saves what was
measured to examples/results/full_disk.json.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from machine import machine  # noqa: E402

from diffhook.log.durable import DurableStore  # noqa: E402
from tests.runs import SteppedTraining  # noqa: E402

STEPS, CHECKPOINT = 10, 6


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def train(folder: Path, full_from: int) -> dict[str, float]:
    """Seconds of the longest step, of the checkpoint and of the end."""
    training, steps, saving = SteppedTraining(folder / "log"), [], 0.0
    disk = mock.patch.object(DurableStore, "write", full)
    for step in range(STEPS):
        if step == full_from:
            disk.start()
        began = time.perf_counter()
        training.step(step)
        steps.append(time.perf_counter() - began)
        if step + 1 == CHECKPOINT:
            began = time.perf_counter()
            training.accelerator.save_state(str(folder / "checkpoint"))
            saving = time.perf_counter() - began
    began = time.perf_counter()
    training.accelerator.end_training()
    disk.stop()
    ending = time.perf_counter() - began
    return {"longest_step": max(steps), "checkpoint": saving, "end": ending}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "examples/results/full_disk.json")
    args = parser.parse_args()
    logging.getLogger("diffhook").setLevel(logging.CRITICAL)
    document: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine(), "steps": STEPS}
    for name, full_from in (("never_full", STEPS), ("full_from_the_opening", 0), ("full_from_step_3", 3)):
        with tempfile.TemporaryDirectory(prefix="diffhook-full-") as folder:
            found = train(Path(folder), full_from)
        document[name] = {f"{what}_seconds": round(seconds, 2) for what, seconds in found.items()}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
