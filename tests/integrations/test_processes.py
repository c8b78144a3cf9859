"""Two gloo processes: each rank its own group, together every sample once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import diffhook
from tests.runs import TinyDenoiser, denoising_losses, identified
from tests.twins import sample_gradients

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_two_ranks_log_every_sample_once_with_its_own_gradient(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(SCRIPT), str(tmp_path / "log"),
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    table = diffhook.open_log(tmp_path / "log").train
    assert sorted(p.name for p in (tmp_path / "log/train").glob("rank-*")) == ["rank-0000", "rank-0001"]
    assert sorted(table["sample"]) == list(range(12))
    np.testing.assert_allclose(table["weight"], 1 / 6)  # a step takes 2 × 3 samples
    # In the first step both ranks still hold the initial parameters.
    torch.manual_seed(0)
    model, data = TinyDenoiser(), identified()
    for row in np.flatnonzero(table["step"] == 0):
        sample = int(table["sample"][row])
        clean = data[sample : sample + 1]
        batch = (clean, torch.ones_like(clean), torch.tensor([int(100 * sample / 4)]))
        expected = sample_gradients(model, denoising_losses, batch)
        assert table["timestep"][row] == int(100 * sample / 4)
        np.testing.assert_allclose(table["grad_norm"][row], float(expected.norm()), rtol=1e-5)
