"""Kill fifty processes that measure checkpoints, at random moments, and check every row they leave.

    python examples/benchmarks/checkpoint_kills.py [--kills 50] [--seed 0]

Saves the counts to examples/results/checkpoint_kills.json, and says what was lost, doubled or wrong.
"""

from __future__ import annotations

from typing import Any

from killing import benchmark

from tests.checkpoints.kills import Harness


def counts(harness: Harness) -> dict[str, Any]:
    return {
        "logs": harness.runs,
        "kills_that_cut_a_sample": harness.cut_samples,
        "rows_checked": harness.rows_checked,
        "lost": harness.lost,
        "doubled": harness.doubled,
        "wrong": harness.wrong,
    }


if __name__ == "__main__":
    benchmark(__doc__, "checkpoint_kills", 50, Harness, counts)
