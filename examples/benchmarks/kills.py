"""Kill a hundred processes that train or compute queries, at random moments, and check every row they leave.

    python examples/benchmarks/kills.py [--kills 100] [--seed 0]

Saves the counts to examples/results/kills.json, and says what was corrupt, lost or doubled, if anything.
"""

from __future__ import annotations

from typing import Any

from killing import benchmark

from tests.log.kills import Harness


def counts(harness: Harness) -> dict[str, Any]:
    return {
        "of_processes_that_computed_queries": harness.killed_queries,
        "runs": harness.runs,
        "rows_checked": harness.rows_checked,
        "unfinished_files_met": harness.litter,
        "corrupt": harness.corrupt,
        "lost": harness.lost,
        "doubled": harness.doubled,
    }


if __name__ == "__main__":
    benchmark(__doc__, "kills", 100, Harness, counts)
