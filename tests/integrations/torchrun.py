"""Processes of one training, as ``torchrun`` starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from diffhook.log.table import Table

HERE = Path(__file__).parent


def torchrun(script: str, *arguments: object, killed: bool = False, processes: int = 2) -> None:
    """Run a script of this folder in so many processes; its words are told where it fails."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        str(HERE / script), *map(str, arguments),
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ("SIGKILL" in done.stderr) if killed else (done.returncode == 0), done.stderr[-3000:]


def assert_same_rows(one: Table, two: Table, rtol: float) -> None:
    """What each row holds does not depend on how many processes wrote them."""
    for name in ("step", "sample", "timestep", "weight", "lr", "loss", "grad_norm", "projection"):
        first, second = (t[name][np.lexsort((t["sample"], t["step"]))] for t in (one, two))
        np.testing.assert_allclose(second, first, rtol=rtol, atol=1e-6, err_msg=name)
