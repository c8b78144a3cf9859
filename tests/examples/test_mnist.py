"""The example that the README's first command runs, on a tenth of the digits and one epoch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist.py"


def test_the_example_runs_and_writes_what_it_promises(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLE, "--out", tmp_path, "--epochs", "1", "--limit", "400"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    for kind in ("all", "patches", "damaged"):
        assert 0 <= result["outliers"][f"auroc_{kind}"] <= 1
    for name in ("held-out", "generated"):
        assert (tmp_path / f"influence-{name}-retrac.csv").exists()
        assert 0 < result[f"cardinality_{name}_retrac"] <= 1
    assert "TracIn self-influence" in done.stdout
    assert len((tmp_path / "outliers.csv").read_text().splitlines()) == 443  # 400 − 8 held out + 50, header
    assert (tmp_path / "page.html").read_text().count('class="query"') == 16
